"""Figures of a step, over all ranks: loss, speed, waiting, padding, memory, utilisation."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch

from valley.data.collate import Batch
from valley.training.engines.base import Engine
from valley.training.feed import Step


@dataclass(frozen=True)
class Counts:
    """What a global batch holds, summed over ranks.

    Attributes:
        num_supervised: tokens that the loss is taken of.
        num_samples: rows that count.
        num_tokens: tokens that are not padding.
        num_places: tokens, padding included.
        num_frames: frames.
        num_flops: model FLOPs; 0 where utilisation is not measured.
        num_rejected: samples rejected on the way to it.
    """

    num_supervised: int
    num_samples: int
    num_tokens: int
    num_places: int
    num_frames: int
    num_flops: float
    num_rejected: int


@dataclass(frozen=True)
class Figures:
    """One step in numbers.

    Attributes:
        counts: what its global batch held.
        loss: mean over the supervised tokens of the global batch.
        grad_norm: before clipping.
        learning_rates: by module.
        seconds: from the end of the step before to the end of this one, of the slowest rank.
        wait_s: part of it spent waiting for data, by the rank that waited longest.
        peak_memory_bytes: most memory held so far by rank 0: of its GPU, else of its process.
        utilisation: model FLOPs done, as a share of what the GPUs could do; None on CPUs.
    """

    counts: Counts
    loss: float
    grad_norm: float
    learning_rates: dict[str, float]
    seconds: float
    wait_s: float
    peak_memory_bytes: int
    utilisation: float | None

    @property
    def samples_per_s(self) -> float:
        """Samples a second, over all ranks."""
        return self.counts.num_samples / self.seconds

    @property
    def wait_share(self) -> float:
        """Share of the step spent waiting for data."""
        return self.wait_s / self.seconds

    @property
    def padding_share(self) -> float:
        """Share of tokens that are padding."""
        return 1 - self.counts.num_tokens / self.counts.num_places

    def metrics(self) -> dict[str, float]:
        """Returns the figures by the names of their curves."""
        rates = self.learning_rates
        equal = len(set(rates.values())) == 1
        learning = {"train/learning_rate": next(iter(rates.values()))}
        metrics = {
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            **(learning if equal else {f"train/learning_rate/{module}": rate for module, rate in rates.items()}),
            "train/supervised_tokens": self.counts.num_supervised,
            "speed/tokens_per_s": self.counts.num_tokens / self.seconds,
            "speed/samples_per_s": self.samples_per_s,
            "speed/frames_per_s": self.counts.num_frames / self.seconds,
            "speed/step_s": self.seconds,
            "data/wait_share": self.wait_share,
            "data/padding_share": self.padding_share,
            "memory/peak_gib": self.peak_memory_bytes / 2**30,
        }
        return metrics if self.utilisation is None else {**metrics, "speed/model_flops_utilisation": self.utilisation}


@dataclass
class Totals:
    """Sums over the steps of a run.

    Speeds are those of the later steps: the first one waits for the decoders to start.
    """

    num_steps: int = 0
    num_samples: int = 0
    num_tokens: int = 0
    num_places: int = 0
    num_frames: int = 0
    seconds: float = 0.0
    later_s: float = 0.0
    later_wait_s: float = 0.0
    later_samples: int = 0
    later_tokens: int = 0
    later_frames: int = 0
    peak_memory_bytes: int = 0

    @property
    def wait_share(self) -> float:
        """Share of the time spent waiting for data."""
        return self.later_wait_s / max(self.later_s, 1e-9)

    def per_second(self, count: int) -> float:
        """A count of later steps (`later_samples`, …) over their time."""
        return count / max(self.later_s, 1e-9)

    def add(self, figures: Figures) -> None:
        """Adds a step."""
        if self.num_steps:
            self.later_s += figures.seconds
            self.later_wait_s += figures.wait_s
            self.later_samples += figures.counts.num_samples
            self.later_tokens += figures.counts.num_tokens
            self.later_frames += figures.counts.num_frames
        self.num_steps += 1
        self.num_samples += figures.counts.num_samples
        self.num_tokens += figures.counts.num_tokens
        self.num_places += figures.counts.num_places
        self.num_frames += figures.counts.num_frames
        self.seconds += figures.seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, figures.peak_memory_bytes)


class StepMeter:
    """Counts what is in a step and measures how it went.

    Args:
        engine: sums over ranks.
        flops: model FLOPs of a batch; None: utilisation is not measured.
        peak_flops: what one rank's device can do a second.
    """

    def __init__(
        self, engine: Engine, flops: Callable[[Batch], float] | None = None, peak_flops: float | None = None
    ) -> None:
        self._engine, self._flops, self._peak_flops = engine, flops, peak_flops

    def count(self, step: Step) -> Counts:
        """Sums over ranks what the step holds.

        Raises:
            RuntimeError: on all ranks, when they came with unequal numbers of micro-batches; the gradients' collectives
                would wait for each other for ever.
        """
        num_batches = len(step.batches)
        own = [sum(column) for column in zip(*map(self._count_batch, step.batches), strict=True)] or [0] * 6
        sums = self._engine.all_reduce_sum([*own, len(step.rejects), num_batches, num_batches**2])
        supervised, samples, tokens, places, frames, flops, rejected, batches, squares = sums
        if batches == 0 or batches**2 != self._engine.world_size * squares:
            raise RuntimeError(f"step {step.index}: ranks have unequal numbers of micro-batches, here {num_batches}")
        return Counts(int(supervised), int(samples), int(tokens), int(places), int(frames), flops, int(rejected))

    def measure(
        self, counts: Counts, loss: float, norm: float, factor: float, *, wait_s: float, work_s: float
    ) -> Figures:
        """Puts a step's figures together, over ranks."""
        engine = self._engine
        per_rank = [0.0] * (2 * engine.world_size)  # each rank fills its own places, so the sum is a gathering
        per_rank[2 * engine.rank : 2 * engine.rank + 2] = wait_s, wait_s + work_s
        total_loss, *gathered = engine.all_reduce_sum([loss, *per_rank])
        seconds = max(gathered[1::2])
        peak = self._peak_flops * engine.world_size * seconds if self._peak_flops else None
        return Figures(
            counts=counts,
            loss=total_loss,
            grad_norm=norm,
            learning_rates={group.module: group.learning_rate * factor for group in engine.groups},
            seconds=seconds,
            wait_s=max(gathered[::2]),
            peak_memory_bytes=peak_memory_bytes(engine.device),
            utilisation=counts.num_flops / peak if peak else None,
        )

    def _count_batch(self, batch: Batch) -> tuple[int | float, ...]:
        return (
            batch.num_supervised,
            sum(source >= 0 for source in batch.sources),
            batch.num_tokens,
            batch.input_ids.numel(),
            len(batch.frames),
            self._flops(batch) if self._flops else 0.0,
        )


def process_gauges() -> dict[str, float]:
    """Returns what this process holds in memory now."""
    return {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the most memory held so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
