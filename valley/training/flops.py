"""Model FLOPs of a batch, for model-FLOPs utilisation.

Counted is what the mathematics needs, not what the hardware does: recomputation by gradient checkpointing and work on
padding are left out. F is what a forward pass costs; the backward pass costs F where gradients only flow through, and F
more where weights train.

    vision tower     F a frame, measured by running one; forward only
    temporal module  F a clip and F' a frame, measured by running clips of one and two frames
    projector        2N a token, N being its numbers
    LLM              2N a token, and 2 L² H a layer for causal attention among the L tokens of a row, which costs three
                     passes even where nothing trains: gradients flow to queries, keys and values
    LM head          2N a supervised token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
    """Counts the model FLOPs of batches, by the formula at the top of this file.

    Args:
        model: still whole and on the CPU.
        groups: what trains of it.
    """

    def __init__(self, model: ValleyForConditionalGeneration, groups: Sequence[ParameterGroup]) -> None:
        trained = {group.module for group in groups}
        tower: Any = model.config.vision_config
        text: Any = model.config.text_config

        def passes(part: str) -> float:
            return 3.0 if part in trained else 2.0

        self._num_patches: int = tower.num_patches
        self._projects_first = model.config.placement == "after_projector"
        one, two = (_measure(model.temporal, *_clip(model, num_frames)) for num_frames in (1, 2))
        frame = torch.zeros(1, tower.size_px, tower.size_px, 3, dtype=torch.uint8)
        self._tower = _measure(model.vision_tower, frame)
        self._frame = passes("temporal") * (two - one)
        self._clip = passes("temporal") * (2 * one - two)
        self._projection = passes("projector") * 2 * model.projector.weight.numel()
        vocabulary = {id(weight) for weight in _vocabulary(model)}
        body = sum(
            parameter.numel()
            for parameter in model.module_parameters("llm").values()
            if parameter.ndim >= 2 and id(parameter) not in vocabulary
        )
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._token = passes("llm") * 2 * body
        self._square: float = 3.0 * 2 * text.num_hidden_layers * text.num_attention_heads * head_width
        self._supervised: float = passes("llm") * 2 * text.vocab_size * text.hidden_size

    def __call__(self, batch: Batch) -> float:
        """Returns the FLOPs of a training step on a micro-batch."""
        lengths = batch.attention_mask.sum(dim=1).double()
        num_tokens, num_squares = float(lengths.sum()), float(lengths.square().sum())
        num_frames, num_clips = len(batch.frames), len(batch.num_frames)
        num_projected = num_frames + self._num_patches * (num_frames if self._projects_first else num_clips)
        return (
            self._tower * (num_frames if batch.frames.dtype == torch.uint8 else 0)
            + self._frame * num_frames
            + self._clip * num_clips
            + self._projection * num_projected
            + self._token * num_tokens
            + self._square * num_squares
            + self._supervised * batch.num_supervised
        )


def _measure(module: nn.Module, *inputs: Tensor) -> float:
    """FLOPs of a forward pass; matrix products only, the rest is small beside them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return float(counter.get_total_flops())


def _clip(model: ValleyForConditionalGeneration, num_frames: int) -> tuple[Tensor, Tensor]:
    """What the temporal module takes for one clip."""
    tower: Any = model.config.vision_config
    text: Any = model.config.text_config
    width = text.hidden_size if model.config.placement == "after_projector" else tower.hidden_size
    dtype = next((parameter.dtype for parameter in model.temporal.parameters()), torch.float32)
    patches = torch.zeros(1, num_frames, tower.num_patches, width, dtype=dtype)
    return patches, torch.ones(1, num_frames, dtype=torch.bool)


def _vocabulary(model: ValleyForConditionalGeneration) -> list[Tensor]:
    """The embedding, which multiplies nothing, and the head, which is counted by itself."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.get_parameter("weight") for layer in layers if layer is not None]
