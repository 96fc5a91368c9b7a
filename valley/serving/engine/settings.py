"""How large the engine is."""

from __future__ import annotations

import os
from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from valley.config import Settings


class EngineSettings(Settings):
    """The engine that writes the answers."""

    slots: PositiveInt = 8
    """Answers written at once. Each slot has room for `max_tokens` in the attention cache, set aside at the start."""
    max_tokens: PositiveInt = 2048
    """Longest prompt and answer together; never more than the language model's own context."""
    chunk_tokens: PositiveInt = 256
    """Tokens of new prompts that a step takes in beside the answers that are being written: more of them is faster for
    the new one and a longer pause for the others."""
    max_waiting: NonNegativeInt = 32
    """Answers that may wait for a slot; more are refused (429)."""
    prefix_bytes: NonNegativeInt = 1 << 30
    """Memory for the attention cache of earlier prompts: the next question about the same video begins there."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and attention cache. `auto`: as saved on a GPU; on a CPU bfloat16 where it has instructions for it,
    float32 where it has not: there it is the faster of the two."""
    threads: NonNegativeInt = 0
    """CPU threads of one pass through the model; 0: one for each core but one, which decoding and HTTP need, and on Ray
    as many as the replica's CPUs. Threads that wait for a busy core make a step many times slower."""
    tower_threads: NonNegativeInt = 0
    """CPU threads of the tower; 0: one for each core that `threads` leaves, on Ray as many as the replica's CPUs."""
    stuck_after_s: PositiveFloat = 60.0
    """An engine that has work and made no step for so long counts as dead."""
    pack_weights: bool = True
    """On a CPU, lay the weights of linear layers out for small batches."""

    @property
    def num_threads(self) -> int:
        """CPU threads of one pass; Ray and others set the default of a process to one."""
        return self.threads or max(1, num_cores() - 1)

    @property
    def num_tower_threads(self) -> int:
        """CPU threads of the tower beside it."""
        return self.tower_threads or max(1, num_cores() - self.num_threads)


def num_cores() -> int:
    """Returns the number of cores that this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
