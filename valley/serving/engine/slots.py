"""The attention cache: one slot for each answer, set aside once, and the attention that reads and writes it.

A step's tokens stand in one row, whatever answers they belong to: `[chunk of prompt A; chunk of prompt B; …; last token
of answers C, D, …]`. Linear layers and norms see one batch; only attention must know whose token is whose. It is
registered with transformers under the name `SLOTTED`, so any backbone that takes attention from there works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from valley.errors import ModelError

SLOTTED = "valley_slots"

Snapshot = list[tuple[Float[Tensor, "K L D"], Float[Tensor, "K L D"]]]
"""Keys and values of one prompt, layer by layer."""


@dataclass(frozen=True)
class Chunk:
    """Tokens of one prompt that a step takes in.

    Attributes:
        slot: where its keys and values go.
        start: position of its first token.
        length: tokens.
    """

    slot: int
    start: int
    length: int


class Slots:
    """Keys and values of all answers, layer by layer `[S, K, L, D]`: slots, key/value heads, positions, head width.

    Memory is set aside as layers ask for it the first time, which the first step does.

    Args:
        num_slots: answers at once.
        num_tokens: positions of each.
    """

    def __init__(self, num_slots: int, num_tokens: int) -> None:
        self.num_slots, self.num_tokens = num_slots, num_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(
        self, index: int, like: Float[Tensor, "1 K N D"], values: Float[Tensor, "1 K N E"]
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values of a layer."""
        if index not in self._layers:
            # Zeros, not whatever memory holds: a free slot is computed with the others, and must be finite.
            self._layers[index] = (
                like.new_zeros(self.num_slots, like.shape[1], self.num_tokens, like.shape[3]),
                like.new_zeros(self.num_slots, values.shape[1], self.num_tokens, values.shape[3]),
            )
        return self._layers[index]

    def clear(self, slot: int) -> None:
        """Forgets what a slot holds."""
        for keys, values in self._layers.values():
            keys[slot] = 0
            values[slot] = 0

    def copy_out(self, slot: int, start: int, end: int) -> Snapshot:
        """Returns a copy of the positions from `start` to `end` of a slot."""
        return [
            (keys[slot, :, start:end].clone(), values[slot, :, start:end].clone())
            for _, (keys, values) in sorted(self._layers.items())
        ]

    def copy_in(self, slot: int, snapshot: Snapshot, length: int) -> None:
        """Writes the first `length` positions of a snapshot into a slot."""
        for (_, (keys, values)), (known_keys, known_values) in zip(sorted(self._layers.items()), snapshot, strict=True):
            keys[slot, :, :length] = known_keys[:, :length]
            values[slot, :, :length] = known_values[:, :length]


@dataclass
class Step:
    """One pass through the language model.

    Attributes:
        slots: the attention cache.
        chunks: of prompts, in the order of their tokens.
        rows: slots of the answers that get one token each, ascending, whose tokens come after the chunks.
        positions: of those tokens.
    """

    slots: Slots
    chunks: Sequence[Chunk]
    rows: Sequence[int]
    positions: Sequence[int]
    device: torch.device
    _masks: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.span = max(self.rows, default=-1) + 1
        self.reach = max(self.positions, default=-1) + 1
        self.is_dense = len(self.rows) == self.span
        self.row_index = torch.tensor(self.rows, dtype=torch.long, device=self.device)
        self.position_index = torch.tensor(self.positions, dtype=torch.long, device=self.device)

    @property
    def position_ids(self) -> Tensor:
        """Position of every token of the step, `[1, N]`."""
        ranges = [torch.arange(chunk.start, chunk.start + chunk.length) for chunk in self.chunks]
        return torch.cat([*ranges, torch.tensor(self.positions, dtype=torch.long)])[None].to(self.device)

    def chunk_mask(self, chunk: Chunk, groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns what is added to the scores of a chunk's queries, `[G * n, L]`: all of them for each group."""
        key = (chunk, groups, window, dtype)
        if key not in self._masks:
            queries = torch.arange(chunk.start, chunk.start + chunk.length, device=self.device)[:, None]
            self._masks[key] = _bias(queries, chunk.start + chunk.length, window, dtype).repeat(groups, 1)
        return self._masks[key]

    def row_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns what is added to the scores of the answers' queries, `[S, 1, 1, L]`; free slots see position 0."""
        key = ("rows", window, dtype)
        if key not in self._masks:
            queries = torch.zeros(self.span, dtype=torch.long, device=self.device)
            queries[self.row_index] = self.position_index
            self._masks[key] = _bias(queries[:, None], self.reach, window, dtype)[:, None, None]
        return self._masks[key]


def _bias(queries: Tensor, num_keys: int, window: int | None, dtype: torch.dtype) -> Tensor:
    keys = torch.arange(num_keys, device=queries.device)
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, dtype=dtype, device=queries.device).masked_fill_(hidden, torch.finfo(dtype).min)


def slotted_attention(
    module: Any,
    query: Float[Tensor, "1 A N D"],
    key: Float[Tensor, "1 K N D"],
    value: Float[Tensor, "1 K N E"],
    attention_mask: None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    step: Step | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 N A E"], None]:
    """Attention of one layer over the slots of a step, which it writes the step's keys and values to.

    The queries of the heads that share a key/value head are taken as further queries of it, so that keys and values are
    read once, and never copied for each head.
    """
    if step is None:
        raise ValueError(f"{SLOTTED} attends within a step of the engine only")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ModelError(f"the engine cannot serve this language model: its attention has a {name}")
    keys, values = step.slots.layer(module.layer_idx, key, value)
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    first = 0
    for chunk in step.chunks:
        part = slice(first, first + chunk.length)
        place = slice(chunk.start, chunk.start + chunk.length)
        keys[chunk.slot, :, place], values[chunk.slot, :, place] = key[0, :, part], value[0, :, part]
        out[0, part] = _attend_chunk(step, chunk, query[0, :, part], keys, values, scaling, sliding_window)
        first += chunk.length
    if step.rows:
        rows, positions = step.row_index, step.position_index
        keys[rows, :, positions], values[rows, :, positions] = (
            key[0, :, first:].transpose(0, 1),
            value[0, :, first:].transpose(0, 1),
        )
        out[0, first:] = _attend_rows(step, query[0, :, first:].transpose(0, 1), keys, values, scaling, sliding_window)
    return out, None


def _attend_chunk(
    step: Step, chunk: Chunk, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Float[Tensor, "N A E"]:
    heads, length, width = query.shape
    groups = heads // keys.shape[1]
    end = chunk.start + chunk.length
    answer = scaled_dot_product_attention(
        query.reshape(1, -1, groups * length, width),
        keys[chunk.slot : chunk.slot + 1, :, :end],
        values[chunk.slot : chunk.slot + 1, :, :end],
        attn_mask=step.chunk_mask(chunk, groups, window, query.dtype),
        scale=scaling,
    )
    return answer.reshape(heads, length, -1).transpose(0, 1)


def _attend_rows(
    step: Step, query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None
) -> Float[Tensor, "N A E"]:
    num, heads, width = query.shape
    grouped = query.reshape(num, keys.shape[1], -1, width)
    if not step.is_dense:  # slots between them are free: they are computed with the others, for nothing
        spread = grouped.new_zeros(step.span, *grouped.shape[1:])
        spread[step.row_index] = grouped
        grouped = spread
    answer = scaled_dot_product_attention(
        grouped,
        keys[: step.span, :, : step.reach],
        values[: step.span, :, : step.reach],
        attn_mask=step.row_mask(window, query.dtype),
        scale=scaling,
    ).reshape(step.span, heads, -1)
    return answer if step.is_dense else answer[step.row_index]


AttentionInterface.register(SLOTTED, slotted_attention)
