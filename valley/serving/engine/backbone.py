"""A language model made ready for the engine: its attention exchanged, and proof that it still computes the same."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from valley.errors import EngineError
from valley.serving.engine.slots import SLOTTED, Chunk, Slots, Step

_PROBE_TOKENS = 9
_TOLERANCE = {torch.float32: 1e-3}
_COARSE = 0.25
_BY_LENGTH = ("dynamic", "longrope")


def check_positions(config: Any, num_tokens: int) -> None:
    """Checks that a token's rotation hangs on its own position alone, and not on the longest answer beside it.

    Raises:
        EngineError: it does, for rotary embeddings that are scaled by the length of what is read.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        known = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        if parameters.get("rope_type") in _BY_LENGTH and num_tokens > known:
            raise EngineError(
                f"engine.max_tokens: this language model's positions ({parameters['rope_type']}) hang on the longest "
                f"answer of a batch beyond {known} tokens; {num_tokens} are too many"
            )


@torch.inference_mode()
def prepare_backbone(language_model: Any, slots: Slots) -> None:
    """Lets a language model attend over `slots`, whose memory is set aside by that.

    A prompt is read as one piece, before, and in chunks and single tokens beside another one, after: scores must agree.

    Args:
        language_model: of any backbone.
        slots: of a dozen positions at least.

    Raises:
        EngineError: the backbone takes its attention from somewhere else, or needs more than positions and embeddings.
    """
    if language_model.config._attn_implementation == SLOTTED:  # it has served another engine
        language_model.set_attn_implementation("eager")
    device, dtype = language_model.device, language_model.dtype
    tokens = torch.arange(_PROBE_TOKENS, device=device) % language_model.config.vocab_size
    embeds = language_model.get_input_embeddings()(tokens)
    expected = language_model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
    name = type(language_model).__name__
    try:
        language_model.set_attn_implementation(SLOTTED)
        found = _read_in_pieces(language_model, embeds, slots)
    except Exception as error:
        raise EngineError(f"{name} does not run in the engine: {type(error).__name__}: {error}") from error
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    if not apart <= _TOLERANCE.get(dtype, _COARSE):
        raise EngineError(f"{name} computes something else in the engine: scores are {apart:.3g} apart")


def _read_in_pieces(language_model: Any, embeds: Float[Tensor, "L H"], slots: Slots) -> Float[Tensor, " V"]:
    half, last = _PROBE_TOKENS // 2, slots.num_slots - 1
    first, second = embeds[:half], embeds[half:-1]
    other = [0] if last else []  # a second answer beside it, where there is room for one
    plan = [
        ([Chunk(last, 0, half)], [], first),
        (
            [Chunk(last, half, len(second)), *(Chunk(slot, 0, half) for slot in other)],
            [],
            torch.cat([second, *[first] * len(other)]),
        ),
        ([], [*other, last], embeds[-1 - len(other) :]),
    ]
    scores = embeds
    for chunks, rows, some in plan:
        positions = [_PROBE_TOKENS - 1 if row == last else half for row in rows]
        step = Step(slots, chunks, rows, positions, embeds.device)
        scores = language_model(
            inputs_embeds=some[None], position_ids=step.position_ids, use_cache=False, step=step
        ).logits[0, -1]
    return scores
