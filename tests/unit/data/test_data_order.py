"""The order of an epoch: every row as often as its source weighs, the same slots whatever the split into ranks."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from valley.data.order import EMPTY, EpochOrder


def make_order(
    sizes: tuple[int, ...] = (40, 25), weights: tuple[float, ...] = (1.0, 1.0), batch: int = 8, seed: int = 5
) -> EpochOrder:
    sources = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.random.default_rng(0).integers(10, 500, len(sources))
    return EpochOrder(sources, lengths, weights, global_batch=batch, seed=seed)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_row_comes_as_often_as_its_source_weighs(epoch: int) -> None:
    order = make_order(sizes=(40, 25, 10, 5), weights=(1.0, 2.5, 0.5, 0.0))
    rows = order.rows(epoch)
    counts = np.bincount(rows[rows != EMPTY], minlength=80)
    assert set(counts[:40]) == {1}
    assert sorted(counts[40:65]) == [2] * 13 + [3] * 12  # half of 25, rounded
    assert sorted(counts[65:75]) == [0] * 5 + [1] * 5
    assert set(counts[75:]) == {0}
    assert order.samples_per_epoch == 40 + 62 + 5


def test_a_share_of_a_source_is_another_one_in_the_next_epoch() -> None:
    order = make_order(sizes=(10,), weights=(0.5,), batch=5)
    halves = [set(order.rows(epoch).tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == set(range(10))
    assert halves[2] == halves[0]
    assert halves[3] == halves[1]


def test_an_epoch_is_a_function_of_seed_and_epoch_alone() -> None:
    one, two = make_order(), make_order()
    assert one.rows(3).tolist() == two.rows(3).tolist()
    assert one.rows(0).tolist() != one.rows(1).tolist()
    assert make_order(seed=6).rows(0).tolist() != one.rows(0).tolist()
    assert pickle.loads(pickle.dumps(one)).rows(3).tolist() == two.rows(3).tolist()
    # Written down, because a run must be resumable by another release of the libraries.
    lengths = np.array([5, 3, 9, 1, 12, 7, 4, 11, 2, 8, 6, 10, 13])
    written_down = EpochOrder(np.zeros(13, dtype=np.int64), lengths, [1.0], global_batch=4, seed=5)
    assert written_down.rows(0).tolist() == [11, 7, 4, 12, 8, 1, 6, 0, 10, 5, 9, 2, 3, -1, -1, -1]


def test_the_last_short_batch_is_kept_and_slots_count_on_through_epochs() -> None:
    order = make_order(sizes=(21,), weights=(1.0,), batch=8)
    assert (order.samples_per_epoch, order.batches_per_epoch, order.slots_per_epoch) == (21, 3, 24)
    assert [order.batch(step).tolist() for step in range(4)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 21)),
        list(range(24, 32)),
    ]
    assert [order.row(slot) for slot in range(21, 24)] == [EMPTY] * 3
    assert order.row(24) == order.rows(1)[0]
    assert sorted(order.row(slot) for slot in range(24, 45)) == list(range(21))
    assert order.row(EMPTY) == EMPTY


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (2, 4), (4, 2), (8, 1), (3, 2), (2, 16), (16, 4)])
def test_ranks_share_a_global_batch_without_changing_it(world_size: int, micro_batch: int) -> None:
    order = make_order(sizes=(21,), weights=(1.0,), batch=8)
    for step in range(5):
        shares = [
            order.micro_batches(step, rank=rank, world_size=world_size, micro_batch=micro_batch)
            for rank in range(world_size)
        ]
        assert len({share.shape for share in shares}) == 1  # else a collective waits for ever
        assert shares[0].shape[1] <= micro_batch
        slots = np.stack(shares).reshape(-1)
        assert sorted(slots[slots != EMPTY].tolist()) == order.batch(step).tolist()


def test_a_micro_batch_never_exceeds_what_the_global_batch_needs() -> None:
    order = make_order(sizes=(64,), weights=(1.0,), batch=8)
    assert order.micro_batches(0, rank=0, world_size=2, micro_batch=16).shape == (1, 4)
    assert order.micro_batches(0, rank=0, world_size=2, micro_batch=3).shape == (2, 2)


def test_like_lengths_share_a_batch_and_batches_come_in_no_order_of_length() -> None:
    sources = np.zeros(4000, dtype=np.int64)
    lengths = np.random.default_rng(0).integers(0, 1000, 4000)
    order = EpochOrder(sources, lengths, [1.0], global_batch=20, seed=1)
    batches = lengths[order.rows(0)].reshape(-1, 20)
    spans = batches.max(axis=1) - batches.min(axis=1)
    assert spans.mean() < 50  # an unsorted batch of 20 spans about 900
    assert abs(np.corrcoef(np.arange(len(batches)), batches.mean(axis=1))[0, 1]) < 0.2
    assert (np.diff(batches, axis=1) >= 0).all()


def test_the_short_batch_is_not_the_longest_samples() -> None:
    lengths = np.arange(1009)
    means = []
    for seed in range(20):
        order = EpochOrder(np.zeros(1009, dtype=np.int64), lengths, [1.0], global_batch=100, seed=seed)
        means.append(lengths[order.rows(0)[1000:1009]].mean())
    assert 400 < np.mean(means) < 600


def test_refills_stay_in_the_source_and_never_repeat() -> None:
    order = make_order(sizes=(40, 4), weights=(1.0, 1.0))
    for slot in range(44):
        row = order.row(slot)
        tried = [row, *(order.refill(slot, attempt) for attempt in (1, 2, 3))]
        assert len(set(tried)) == 4
        assert len({candidate >= 40 for candidate in tried if candidate is not None}) == 1
        assert tried[1:] == [order.refill(slot, attempt) for attempt in (1, 2, 3)]


def test_refills_differ_between_slots_and_epochs_and_end_with_the_source() -> None:
    order = make_order(sizes=(1000,), weights=(1.0,), batch=10)
    firsts = [order.refill(slot, 1) for slot in range(0, 4000, 10)]
    assert len(set(firsts)) > 250
    assert order.refill(0, 1) != order.refill(order.slots_per_epoch, 1)
    alone = make_order(sizes=(2,), weights=(1.0,), batch=2)
    assert alone.refill(0, 1) == 1 - alone.row(0)
    assert alone.refill(0, 2) is None


def test_only_the_rows_asked_for_are_used_refills_included() -> None:
    sources = np.repeat([0, 1], [50, 50])
    rows = np.arange(0, 100, 2)
    order = EpochOrder(sources, np.ones(100, dtype=np.int64), [1.0, 1.0], global_batch=10, seed=0, rows=rows)
    assert sorted(order.rows(0).tolist()) == rows.tolist()
    assert all(refill is not None and refill % 2 == 0 for slot in range(50) for refill in [order.refill(slot, 1)])


def test_no_row_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight above 0"):
        make_order(weights=(0.0, 0.0))


def test_threads_may_ask_for_two_epochs_at_once() -> None:
    order = make_order()
    slots = list(range(order.slots_per_epoch, 2 * order.slots_per_epoch))
    pairs = [slot for pair in zip(slots, (slot - len(slots) for slot in slots), strict=True) for slot in pair] * 20
    expected = {slot: make_order().row(slot) for slot in pairs}
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(order.row, pairs)) == [expected[slot] for slot in pairs]


def test_a_million_rows() -> None:
    lengths = np.random.default_rng(0).integers(0, 2000, 1_000_000)
    order = EpochOrder(np.zeros(1_000_000, dtype=np.uint16), lengths, [1.0], global_batch=128, seed=0)
    rows = order.rows(0)
    assert np.array_equal(np.sort(rows[rows != EMPTY]), np.arange(1_000_000))
    assert rows.nbytes < 9_000_000


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_mixture_of_text_images_and_videos_is_hardly_padded(world_size: int) -> None:
    random = np.random.default_rng(0)
    kinds = [random.integers(60, 900, 800), random.integers(322, 762, 1200), random.integers(308, 668, 1200)]
    lengths = np.concatenate(kinds)
    estimates = lengths * random.uniform(0.95, 1.05, len(lengths))
    sources = np.repeat([0, 1, 2], [800, 1200, 1200])
    order = EpochOrder(sources, estimates.astype(np.int64), [1.0, 1.0, 2.5], global_batch=32, seed=0)

    tokens = places = 0
    for k in range(order.batches_per_epoch):
        for rank in range(world_size):
            for slots in order.micro_batches(k, rank=rank, world_size=world_size, micro_batch=4):
                filled = [lengths[order.row(int(slot))] for slot in slots if order.row(int(slot)) != EMPTY]
                tokens += sum(filled)
                places += max(filled, default=0) * len(filled)

    assert 1 - tokens / places < 0.1
