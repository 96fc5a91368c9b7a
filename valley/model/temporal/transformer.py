"""v3 (paper 4.2): a transformer layer over time, beside the mean."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import relu
from transformers.initialization import copy_

from valley.model.temporal.mean import masked_mean

MAX_HEADS = 8
FEED_FORWARD = 2048


class SignedNorm(nn.LayerNorm):
    """A layer norm whose weights begin as random signs, not as ones.

    With ones, the encoder of v3, whose residual path dominates at first, adds the last frame to the mean, and which of
    the two an object was in is lost. With signs, half of the channels begin as a sum and half as a difference.
    """

    def reset_parameters(self) -> None:
        """Draws the signs, unless the weights were loaded."""
        super().reset_parameters()
        copy_(self.weight, torch.randint(0, 2, self.weight.shape) * 2 - 1)


class TemporalTransformer(nn.Module):
    r"""`V_hat[p] = encoder(V[1..T, p] + PE[1..T])[T] + 1/T * sum_t V[t, p]`, for every patch position p by itself.

    `encoder` is one post-norm transformer layer (8 heads, feed-forward 2048, ReLU, no dropout) and
    `PE[t, 2i] = sin(t / 10000^(2i/D))`, `PE[t, 2i+1] = cos(t / 10000^(2i/D))` with t from 0. Only the layer's last time
    step is used, so only that one is computed: every time step is a key, the last alone a query. The mean is taken of
    the patches without PE.

    A width that 8 does not divide gets the largest number of heads below 8 that does.

    Args:
        dim: width D of the patches.
        num_patches: patches P of a frame (v3 does not depend on it).
    """

    def __init__(self, dim: int, num_patches: int) -> None:
        super().__init__()
        self.dim = dim
        heads = next(heads for heads in range(MAX_HEADS, 0, -1) if dim % heads == 0)
        self.layer = nn.TransformerEncoderLayer(dim, heads, FEED_FORWARD, dropout=0.0, batch_first=True)
        self.layer.norm2 = SignedNorm(dim)

    def forward(self, patches: Float[Tensor, "B T P D"], frame_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B P D"]:
        """Returns the encoder's state at each clip's last frame, plus the mean over its frames."""
        batch, num_frames, num_patches, dim = patches.shape
        present = patches.masked_fill(~frame_mask[:, :, None, None], 0)
        encoding = self.positions(num_frames).to(patches)
        states = (present + encoding[:, None, :]).transpose(1, 2).reshape(batch * num_patches, num_frames, dim)
        absent = (~frame_mask).repeat_interleave(num_patches, dim=0)
        last = (frame_mask.sum(1) - 1).repeat_interleave(num_patches)
        rows = torch.arange(len(states), device=states.device)
        encoded = self._encode(states[rows, last].unsqueeze(1), states, absent)
        return encoded.view(batch, num_patches, dim) + masked_mean(patches, frame_mask)

    def positions(self, num_frames: int) -> Float[Tensor, "T D"]:
        """Returns what is added to the patches of each frame: `PE`."""
        return sinusoids(num_frames, self.dim)

    def _encode(
        self, query: Float[Tensor, "N 1 D"], states: Float[Tensor, "N T D"], absent: Bool[Tensor, "N T"]
    ) -> Float[Tensor, "N 1 D"]:
        layer = self.layer
        attended, _ = layer.self_attn(query, states, states, key_padding_mask=absent, need_weights=False)
        query = layer.norm1(query + attended)
        encoded: Tensor = layer.norm2(query + layer.linear2(relu(layer.linear1(query))))
        return encoded


def sinusoids(num_frames: int, dim: int) -> Float[Tensor, "T D"]:
    """Returns `PE`: sines in the even channels, cosines in the odd ones, in float64."""
    time = torch.arange(num_frames, dtype=torch.float64)[:, None]
    even = torch.arange(0, dim, 2, dtype=torch.float64)
    angle = time / 10000.0 ** (even / dim)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :dim]
