"""A rank's share of the global batches, loaded ahead of the training in the order of its slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from jaxtyping import Int64

from valley.data.collate import Batch, Sample, collate
from valley.data.loading import Loader
from valley.data.order import EpochOrder
from valley.data.rejects import Reject

T = TypeVar("T")
_END = object()


@dataclass(frozen=True)
class Step:
    """One rank's part of a global batch.

    Attributes:
        index: number k of the global batch, from 0 on.
        batches: micro-batches; every rank has as many.
        rejects: samples that could not be used on the way to them.
    """

    index: int
    batches: tuple[Batch, ...]
    rejects: tuple[Reject, ...] = ()


@dataclass(frozen=True)
class Share:
    """Which slots one rank loads, and how they fall into micro-batches and steps.

    Attributes:
        order: which sample is in which slot.
        rank: the rank.
        world_size: number of ranks.
        micro_batch: most rows of a micro-batch.
        first_step: the step to begin with.
        total_steps: one past the last.
    """

    order: EpochOrder
    rank: int
    world_size: int
    micro_batch: int
    first_step: int
    total_steps: int

    def step(self, index: int) -> Int64[np.ndarray, "turns rows"]:
        """The slots of one step, a row for each micro-batch; all micro-batches of a run are as wide."""
        return self.order.micro_batches(index, rank=self.rank, world_size=self.world_size, micro_batch=self.micro_batch)

    @property
    def width(self) -> int:
        """Rows of every micro-batch."""
        return int(self.step(self.first_step).shape[1])

    def slots(self) -> Int64[np.ndarray, " N"]:
        """All slots from `first_step` on, in the order in which they are needed."""
        steps = [self.step(index).reshape(-1) for index in range(self.first_step, self.total_steps)]
        return np.concatenate(steps or [np.zeros(0, dtype=np.int64)])

    def assemble(self, micro_batches: Iterable[list[Sample]], pad_id: int, *, pin: bool = False) -> Iterator[Step]:
        """Yields the steps, from the samples of `slots()`, `width` at a time.

        Args:
            micro_batches: the samples.
            pad_id: the token that pads.
            pin: put them into page-locked memory, for a GPU.

        Raises:
            RuntimeError: the samples ended too early.
        """
        batches = iter(micro_batches)
        for index in range(self.first_step, self.total_steps):
            samples = list(islice(batches, len(self.step(index))))
            if len(samples) < len(self.step(index)):
                raise RuntimeError(f"the data ended in step {index}, before step {self.total_steps}")
            rejects = tuple(reject for some in samples for sample in some for reject in sample.rejects)
            batches_of_step = (collate(some, pad_id) for some in samples)
            yield Step(index, tuple(batch.pin() if pin else batch for batch in batches_of_step), rejects)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yields items that a thread makes, the next one while one is in use; the thread's error comes in its place."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
    try:
        waiting = thread.submit(next, items, _END)
        while (item := waiting.result()) is not _END:
            waiting = thread.submit(next, items, _END)
            yield cast(T, item)
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # whoever fails does not wait for the next item


@runtime_checkable
class SlotLoader(Protocol):
    """Loads one slot; `valley.data.loading.Loader` in a run."""

    def load(self, slot: int) -> Sample:
        """Returns what the slot holds."""
        ...


@runtime_checkable
class Stream(Protocol):
    """Loads slots ahead of their use; threads here, Ray Data in `valley.distributed`."""

    def __call__(self, loader: Loader, slots: Int64[np.ndarray, " N"], batch_size: int) -> Iterator[list[Sample]]:
        """Yields the samples of `slots` in their order, `batch_size` at a time."""
        ...


def load_ahead(
    loader: SlotLoader, slots: Int64[np.ndarray, " N"], batch_size: int, *, num_threads: int = 2, num_ahead: int = 2
) -> Iterator[list[Sample]]:
    """Loads slots on threads of this process, up to `num_ahead` batches before they are asked for.

    Args:
        loader: loads one slot.
        slots: slot numbers, in the order to be yielded.
        batch_size: samples in a yielded list; the last may be shorter.
        num_threads: slots loaded at once; decoders release the interpreter's lock.
        num_ahead: finished batches that may wait.

    Raises:
        StorageError: storage failed on every try.
    """
    numbers = iter(slots.tolist())
    with ThreadPoolExecutor(num_threads, thread_name_prefix="load") as threads:
        waiting: deque[Future[Sample]] = deque()
        try:
            for slot in numbers:
                waiting.append(threads.submit(loader.load, slot))
                if len(waiting) >= batch_size * (num_ahead + 1):
                    yield [waiting.popleft().result() for _ in range(batch_size)]
            while waiting:
                yield [waiting.popleft().result() for _ in range(min(batch_size, len(waiting)))]
        finally:
            for future in waiting:
                future.cancel()
