"""Samples ready for the model, and the batches made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import BFloat16, Int64, UInt8, UInt16
from torch import Tensor

from valley.data.order import EMPTY
from valley.data.rejects import Reject

IGNORED = -100
"""Label of a token that is not supervised."""


@dataclass(slots=True)
class Timings:
    """What a sample cost, tries that failed included.

    Attributes:
        read_s: finding files and fetching remote ones.
        decode_s: probing, decoding and resizing.
        encode_s: tokenising.
        num_frames: frames decoded.
    """

    read_s: float = 0.0
    decode_s: float = 0.0
    encode_s: float = 0.0
    num_frames: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """What a slot holds.

    Attributes:
        slot: its number; `EMPTY` for a row that only pads a micro-batch.
        row: the manifest row in it, `EMPTY` when none could be used.
        sample_id: the record's id.
        source: index of its source, -1 when there is none.
        input_ids: tokens.
        labels: the same where supervised, `IGNORED` elsewhere.
        frames: of all its media, one after the other: pictures as the tower takes them before normalising, or the bits
            of the bf16 tokens that it has made of them.
        num_frames: frames of each medium.
        weight: 1, or 0 for a row that must not count.
        cut_tokens: tokens cut off its end.
        notes: what was odd about files that were used nevertheless.
        rejects: the samples that were tried in this slot and could not be used.
        timings: what it cost.
    """

    slot: int
    row: int
    sample_id: str
    source: int
    input_ids: Int64[np.ndarray, " L"]
    labels: Int64[np.ndarray, " L"]
    frames: UInt8[np.ndarray, "F S S 3"] | UInt16[np.ndarray, "F N D"]
    num_frames: Int64[np.ndarray, " M"]
    weight: float = 1.0
    cut_tokens: int = 0
    notes: tuple[str, ...] = ()
    rejects: tuple[Reject, ...] = ()
    timings: Timings = field(default_factory=Timings)


def make_filler(
    slot: int,
    no_frames: UInt8[np.ndarray, "0 S S 3"] | UInt16[np.ndarray, "0 N D"],
    *,
    rejects: tuple[Reject, ...] = (),
    timings: Timings | None = None,
) -> Sample:
    """A sample of weight 0 for a slot that has none: one token, nothing supervised, no media."""
    return Sample(
        slot=slot,
        row=EMPTY,
        sample_id="",
        source=-1,
        input_ids=np.zeros(1, dtype=np.int64),
        labels=np.full(1, IGNORED, dtype=np.int64),
        frames=no_frames,
        num_frames=np.zeros(0, dtype=np.int64),
        weight=0.0,
        rejects=rejects,
        timings=timings or Timings(),
    )


def frames_tensor(
    frames: UInt8[np.ndarray, "F S S 3"] | UInt16[np.ndarray, "F N D"],
) -> UInt8[Tensor, "F S S 3"] | BFloat16[Tensor, "F N D"]:
    """A sample's frames as the model takes them."""
    if frames.dtype == np.uint8:
        return torch.from_numpy(frames)
    return torch.from_numpy(frames.view(np.int16)).view(torch.bfloat16)


def frames_argument(frames: Tensor) -> str:
    """The name under which the model takes frames: pictures, or the tower's tokens of them."""
    return "pixel_values" if frames.dtype == torch.uint8 else "frame_tokens"


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples side by side, padded on the right.

    Attributes:
        input_ids: tokens.
        attention_mask: 1 where there is a token, 0 where it is padding.
        labels: the tokens where supervised, `IGNORED` elsewhere; wholly so in rows of weight 0.
        frames: of all media, in the order of rows and, within a row, of appearance; pictures or tokens.
        num_frames: frames of each medium; they sum up to F.
        sample_ids: id of every row's record.
        sources: index of every row's source, -1 for rows of weight 0.
        slots: every row's slot.
    """

    input_ids: Int64[Tensor, "B L"]
    attention_mask: Int64[Tensor, "B L"]
    labels: Int64[Tensor, "B L"]
    frames: UInt8[Tensor, "F S S 3"] | BFloat16[Tensor, "F N D"]
    num_frames: Int64[Tensor, " M"]
    sample_ids: tuple[str, ...]
    sources: tuple[int, ...]
    slots: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.slots)

    @property
    def num_tokens(self) -> int:
        """Tokens, padding left out."""
        return int(self.attention_mask.sum())

    @property
    def padding_share(self) -> float:
        """Share of the positions that is padding, in [0, 1)."""
        return 1 - self.num_tokens / self.input_ids.numel()

    @property
    def num_supervised(self) -> int:
        """Tokens that the loss counts: supervised ones, but for a row's first, which nothing predicts."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on a device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, **moved)

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model; without media there are no frames, and `num_frames` is None."""
        inputs: dict[str, Any] = {name: getattr(self, name) for name in _TENSORS}
        frames = inputs.pop("frames")
        return inputs | ({frames_argument(frames): frames} if len(self.num_frames) else {"num_frames": None})


_TENSORS = ("input_ids", "attention_mask", "labels", "frames", "num_frames")


def collate(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Puts samples side by side.

    Args:
        samples: at least one, all with pictures of one size or all with tokens.
        pad_id: the token that pads.
    """
    length = max(len(sample.input_ids) for sample in samples)
    input_ids = np.full((len(samples), length), pad_id, dtype=np.int64)
    labels = np.full((len(samples), length), IGNORED, dtype=np.int64)
    attention_mask = np.zeros((len(samples), length), dtype=np.int64)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        input_ids[row, :end] = sample.input_ids
        attention_mask[row, :end] = 1
        if sample.weight:
            labels[row, :end] = sample.labels
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(attention_mask),
        labels=torch.from_numpy(labels),
        frames=frames_tensor(np.concatenate([sample.frames for sample in samples])),
        num_frames=torch.from_numpy(np.concatenate([sample.num_frames for sample in samples]).astype(np.int64)),
        sample_ids=tuple(sample.sample_id for sample in samples),
        sources=tuple(sample.source for sample in samples),
        slots=tuple(sample.slot for sample in samples),
    )
