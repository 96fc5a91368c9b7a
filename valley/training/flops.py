"""Model FLOPs of a batch, for model-FLOPs utilisation.

Counted is what the mathematics needs, not what the hardware does: recomputation by gradient checkpointing and work on
padding are left out. A matrix of N numbers costs 2N FLOPs for each vector it meets in the forward pass, 2N more where
gradients flow through it, and 2N more where it trains:

    vision tower     2N a token of a frame, forward only, and 4 n² D for attention among the n tokens of a frame
    temporal module  6N a patch of a frame; a matrix that reads the whole frame meets it once
    projector        6N a visual token
    LLM              6N a token, and 6 L² H a layer for causal attention among the L tokens of a row
    LM head          6N a supervised token

with 2N less where a part is frozen but gradients flow through it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from valley.data.collate import Batch
from valley.model.modeling import ValleyForConditionalGeneration
from valley.training.stage import ParameterGroup

BF16_PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "A10G": 70e12,
}
"""Dense bf16 FLOP/s of a device, by part of its name, as its maker gives it."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Returns the dense FLOP/s of a device at a precision; None where they are not known, as on CPUs."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in BF16_PEAK.items() if part in name), None)


class FlopCounter:
    """Counts the model FLOPs of batches, by the formula at the top of this file."""

    def __init__(self, model: ValleyForConditionalGeneration, groups: Sequence[ParameterGroup]) -> None:
        trained = {group.module for group in groups}
        tower: Any = model.config.vision_config
        text: Any = model.config.text_config
        num_tokens, frame_numbers = tower.num_patches + 1, tower.num_patches * tower.hidden_size
        vision, temporal, projector = (
            _matrices(model.module_parameters(part).values()) for part in ("vision", "temporal", "projector")
        )
        vocabulary = {id(layer.weight): layer.weight for layer in _vocabulary(model)}
        body = [p for p in model.module_parameters("llm").values() if id(p) not in vocabulary]
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads

        def cost(part: str) -> float:
            return 6.0 if part in trained else 4.0

        self._num_patches: int = tower.num_patches
        self._projects_first = model.config.placement == "after_projector"
        self._frame: float = 2.0 * num_tokens * sum(matrix.numel() for matrix in vision)
        self._frame += 4.0 * num_tokens**2 * tower.hidden_size * _num_blocks(model)
        for matrix in temporal:
            meets = 1 if matrix.shape[1] >= frame_numbers else tower.num_patches
            self._frame += cost("temporal") * matrix.numel() * meets
        self._projection = cost("projector") * sum(matrix.numel() for matrix in projector)
        self._token = cost("llm") * sum(matrix.numel() for matrix in _matrices(body))
        self._supervised_token: float = cost("llm") * text.vocab_size * text.hidden_size
        self._square: float = 6.0 * text.num_hidden_layers * text.num_attention_heads * head_width

    def __call__(self, batch: Batch) -> float:
        """Returns the FLOPs of a training step on a micro-batch."""
        lengths = batch.attention_mask.sum(dim=1).double()
        num_tokens, num_squares = float(lengths.sum()), float(lengths.square().sum())
        num_frames = len(batch.pixel_values)
        num_projected = num_frames + self._num_patches * (num_frames if self._projects_first else len(batch.num_frames))
        return (
            self._frame * num_frames
            + self._projection * num_projected
            + self._token * num_tokens
            + self._square * num_squares
            + self._supervised_token * batch.num_supervised
        )


def _matrices(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [parameter for parameter in parameters if parameter.ndim >= 2]


def _vocabulary(model: ValleyForConditionalGeneration) -> list[nn.Module]:
    """The embedding, which multiplies nothing, and the head, which is counted by itself."""
    head = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([head] if head is not None else [])]


def _num_blocks(model: ValleyForConditionalGeneration) -> int:
    """Blocks of the tower: each has one output matrix of attention as wide as the tower."""
    names = model.module_parameters("vision")
    return len({match[1] for name in names if (match := re.search(r"\.(?:resblocks|blocks)\.(\d+)\.", name))})
