"""v1 (paper 4.2): the mean over time."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class TemporalMean(nn.Module):
    r"""`V_hat[p] = 1/T * sum_t V[t, p]`; it has no parameters.

    Args:
        dim: width D of the patches (v1 does not depend on it).
        num_patches: patches P of a frame (nor on this).
    """

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()

    def forward(self, patches: Float[Tensor, "B T P D"], frame_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B P D"]:
        """Returns the mean of the frames that are there, added up in float32 at least."""
        return masked_mean(patches, frame_mask)


def masked_mean(patches: Float[Tensor, "B T P D"], frame_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B P D"]:
    """Returns the mean over time of the frames that are there."""
    absent = ~frame_mask[:, :, None, None]
    total = patches.masked_fill(absent, 0).sum(1, dtype=torch.promote_types(patches.dtype, torch.float32))
    return (total / frame_mask.sum(1)[:, None, None]).to(patches.dtype)
