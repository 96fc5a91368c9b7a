"""v2 (paper 4.2): a mean over time in which every frame has a learned weight."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class TemporalWeighting(nn.Module):
    r"""`V_hat[p] = sum_t a[t] * V[t, p]` with `a = softmax_t(w . flatten(V[t]) + b)`.

    One linear layer `P*D -> 1` scores a frame by all its patches, the first patch's D channels first.

    Args:
        dim: width D of the patches.
        num_patches: patches P of a frame.
    """

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.score = nn.Linear(num_patches * dim, 1)

    def forward(self, patches: Float[Tensor, "B T P D"], frame_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B P D"]:
        """Returns the weighted sum over the frames that are there."""
        patches = patches.masked_fill(~frame_mask[:, :, None, None], 0)
        scores = self.score(patches.flatten(2)).squeeze(-1).masked_fill(~frame_mask, -torch.inf)
        return torch.einsum("bt,btpd->bpd", scores.softmax(dim=1), patches)
