"""Attention caches of earlier prompts: the next prompt that begins alike starts where it differs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from valley.serving.engine.slots import Snapshot


@dataclass(frozen=True)
class _Entry:
    keys: Int64[np.ndarray, " L"]
    snapshot: Snapshot
    num_bytes: int


class PrefixCache:
    """Keys and values of prompts, the least recently used ones forgotten.

    Args:
        max_bytes: memory that it may take; 0: it keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0
        self.num_bytes = 0

    def find(self, keys: Int64[np.ndarray, " L"]) -> tuple[int, Snapshot | None]:
        """Returns how many of the first positions are known, and what holds them.

        Never all of them: the last token has to pass through the model for its logits.
        """
        length, name = max(
            ((_common(entry.keys, keys), name) for name, entry in self._entries.items()), default=(0, -1)
        )
        length = min(length, len(keys) - 1)
        if length < 1:
            return 0, None
        self._entries.move_to_end(name)
        return length, self._entries[name].snapshot

    def wants(self, keys: Int64[np.ndarray, " L"]) -> bool:
        """Tells whether these positions are worth keeping: switched on, and not known already."""
        return self._max_bytes > 0 and all(_common(entry.keys, keys) < len(keys) for entry in self._entries.values())

    def add(self, keys: Int64[np.ndarray, " L"], snapshot: Snapshot) -> None:
        """Keeps what a prompt left; what it continues is forgotten, for it holds that, too."""
        num_bytes = sum(one.nbytes + other.nbytes for one, other in snapshot)
        if num_bytes > self._max_bytes:
            return
        for name in [name for name, entry in self._entries.items() if _common(entry.keys, keys) == len(entry.keys)]:
            self._forget(name)
        self._entries[self._next] = _Entry(keys, snapshot, num_bytes)
        self._next += 1
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            self._forget(next(iter(self._entries)))

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.num_bytes = 0

    def _forget(self, name: int) -> None:
        self.num_bytes -= self._entries.pop(name).num_bytes


def _common(one: Int64[np.ndarray, " L"], other: Int64[np.ndarray, " M"]) -> int:
    """How many of the first positions are equal."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
