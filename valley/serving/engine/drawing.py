"""The next token of each answer from its logits; what one answer draws never depends on the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from valley.serving.engine.interface import Decoding

_LEAST_TEMPERATURE = 1e-6
"""Smaller ones would be 0 in single precision."""


def new_generator(decoding: Decoding) -> torch.Generator:
    """Returns the source of one answer's random numbers."""
    generator = torch.Generator()
    if decoding.seed is None:
        generator.seed()
    else:
        generator.manual_seed(decoding.seed)
    return generator


def draw(
    logits: Float[Tensor, "B V"], decodings: Sequence[Decoding], generators: Sequence[torch.Generator]
) -> tuple[Int64[Tensor, " B"], Bool[Tensor, " B"]]:
    """Returns the next token of each row, and whether the row's logits can be used at all.

    At temperature 0 it is the likeliest. Else one number u in [0, 1) is drawn from the row's own generator, and the
    token is the one at which the cumulated probability of the likeliest tokens, cut off at `top_p`, passes u.

    Args:
        logits: minus infinity where a token is never wanted.
        decodings: of the rows.
        generators: of the rows.
    """
    logits = logits.float()
    usable = ~(logits.isnan().any(-1) | (logits == float("inf")).any(-1))
    tokens = logits.argmax(-1)
    drawn = [row for row, decoding in enumerate(decodings) if decoding.temperature > 0]
    if drawn:
        device = logits.device
        temperature = torch.tensor([decodings[row].temperature for row in drawn], device=device)
        top_p = torch.tensor([decodings[row].top_p for row in drawn], device=device)
        uniform = torch.stack([torch.rand((), generator=generators[row]) for row in drawn]).to(device)
        rows = logits[torch.tensor(drawn, device=device)].nan_to_num(nan=0.0, posinf=0.0, neginf=float("-inf"))
        rows = (rows - rows.amax(-1, keepdim=True)) / temperature.clamp(min=_LEAST_TEMPERATURE)[:, None]
        probabilities, order = rows.softmax(-1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        is_kept = before < top_p[:, None]
        is_kept[:, 0] = True  # whatever rounding makes of a tiny `top_p`
        kept = probabilities * is_kept
        cumulated = kept.cumsum(-1)
        place = torch.searchsorted(cumulated, uniform[:, None] * cumulated[:, -1:], right=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1
        tokens[torch.tensor(drawn, device=device)] = order.gather(1, place.clamp(max=last)).squeeze(1)
    return tokens, usable
