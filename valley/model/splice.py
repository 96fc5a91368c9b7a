"""Which visual token goes where: from the tokens of frames to places in the prompt, without a loop over tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def pad_clips(
    frames: Float[Tensor, "F N D"], num_frames: Int[Tensor, " M"]
) -> tuple[Float[Tensor, "M T N D"], Bool[Tensor, "M T"]]:
    """Returns the frames of each clip in a row of its own, padded to the longest, and where frames are.

    The padding repeats frames of other clips; only the mask tells it apart.
    """
    time = torch.arange(int(num_frames.max()), device=frames.device)
    first = num_frames.cumsum(0) - num_frames
    places = (first[:, None] + time).clamp(max=len(frames) - 1)
    return frames[places], time < num_frames[:, None]


def join_clips(
    clips: Float[Tensor, "M P H"], frames: Float[Tensor, "F H"], num_frames: Int[Tensor, " M"]
) -> Float[Tensor, "V H"]:
    """Returns `[V_hat (P tokens); CLS of frame 1; …; CLS of frame T]` of each clip, one clip after the other."""
    is_frame = frame_places(num_frames, clips.shape[1])
    patches = clips.flatten(0, 1)
    order = torch.where(is_frame, len(patches) + is_frame.cumsum(0), (~is_frame).cumsum(0)) - 1
    return torch.cat([patches, frames])[order]


def frame_places(num_frames: Int[Tensor, " M"], num_patches: int) -> Bool[Tensor, " V"]:
    """Returns, for every visual token in reading order, whether it stands for a frame, not for a patch."""
    runs = torch.stack([torch.full_like(num_frames, num_patches), num_frames], dim=1).flatten()
    kinds = torch.tensor([False, True], device=num_frames.device).repeat(len(num_frames))
    return kinds.repeat_interleave(runs)


def repeat_rows(items: Tensor, items_per_row: Int[Tensor, " B"], times: int) -> Tensor:
    """Returns the items of each row `times` over before those of the next row, as beams and samples need them.

    Args:
        items: items of all rows, one row after the other, along the first dimension.
        items_per_row: how many each row has.
        times: copies of a row that stand next to each other.
    """
    rows = torch.split(items, items_per_row.tolist())
    return torch.cat([row for row in rows for _ in range(times)])
