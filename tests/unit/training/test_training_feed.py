"""A rank gets its own slots, in their order, loaded ahead of their use but not far."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from valley.data.collate import Sample, make_filler
from valley.data.order import EMPTY, EpochOrder
from valley.data.rejects import Reject
from valley.training.feed import Share, load_ahead, one_ahead


class CountingLoader:
    """Returns fillers that carry their slot; later slots are ready before earlier ones."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.loaded: list[int] = []
        self._fails_at = fails_at
        self._seventh = threading.Event()

    def load(self, slot: int) -> Sample:
        if slot == self._fails_at:
            raise OSError("storage is gone")
        if slot == 6:
            self._seventh.set()
        if slot == 5:
            self._seventh.wait(timeout=10)
        self.loaded.append(slot)
        reject = Reject(slot, f"bad-{slot}", "source", "path", "decode", "DamagedMediaError", "cut", 0.0)
        return make_filler(slot, np.zeros((0, 2, 2, 3), dtype=np.uint8), rejects=(reject,) if slot % 4 == 0 else ())


def order(samples: int = 22, global_batch: int = 8) -> EpochOrder:
    return EpochOrder(np.zeros(samples, dtype=np.int64), np.arange(samples), [1.0], global_batch=global_batch, seed=3)


def test_samples_come_in_the_order_of_slots_though_a_later_one_is_ready_first() -> None:
    loader = CountingLoader()

    batches = [[sample.slot for sample in batch] for batch in load_ahead(loader, np.arange(4, 15), 3, num_threads=2)]

    assert batches == [[4, 5, 6], [7, 8, 9], [10, 11, 12], [13, 14]]


def test_no_more_is_loaded_than_the_batches_ahead() -> None:
    loader = CountingLoader()
    stream = load_ahead(loader, np.arange(100, 200), 4, num_threads=4, num_ahead=2)

    next(stream)
    stream.close()

    assert len(loader.loaded) <= 4 * 3


def test_a_failure_of_storage_reaches_the_training() -> None:
    stream = load_ahead(CountingLoader(fails_at=22), np.arange(20, 30), 2)

    assert [sample.slot for sample in next(stream)] == [20, 21]
    with pytest.raises(OSError, match="storage is gone"):
        next(stream)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 3), (2, 4), (2, 1), (3, 2), (8, 1)])
def test_the_ranks_steps_make_up_the_global_batches_whatever_the_split(world_size: int, micro_batch: int) -> None:
    steps = []
    for rank in range(world_size):
        share = Share(order(), rank, world_size, micro_batch, first_step=1, total_steps=4)
        samples = load_ahead(CountingLoader(), share.slots(), share.width)
        steps.append(list(share.assemble(samples, pad_id=0)))

    assert [[step.index for step in rank] for rank in steps] == [[1, 2, 3]] * world_size
    for index, together in zip([1, 2, 3], zip(*steps, strict=True), strict=True):
        slots = [slot for step in together for batch in step.batches for slot in batch.slots if slot != EMPTY]
        assert sorted(slots) == order().batch(index).tolist()
        assert len({len(step.batches) for step in together}) == 1
        rejected = [reject.slot for step in together for reject in step.rejects if reject.slot != EMPTY]
        assert sorted(rejected) == [slot for slot in sorted(slots) if slot % 4 == 0]


def test_the_next_item_is_made_while_one_is_in_use_and_no_more() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    ahead = one_ahead(items())
    assert next(ahead) == 0
    give_up_s = time.monotonic() + 30
    while len(made) < 2 and time.monotonic() < give_up_s:
        time.sleep(0.001)
    assert made == [0, 1]
    assert list(ahead) == [1, 2, 3]


def test_an_error_ahead_comes_when_its_turn_has_come() -> None:
    ahead = one_ahead(1 // (1 - number) for number in range(3))
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_samples_that_end_too_early_are_an_error_that_says_where() -> None:
    share = Share(order(), 0, 1, 4, 0, 3)
    batches = list(load_ahead(CountingLoader(), share.slots(), share.width))
    with pytest.raises(RuntimeError, match="the data ended in step 2, before step 3"):
        list(share.assemble(batches[:-1], pad_id=0))
