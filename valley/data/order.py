"""Which sample comes when: the slots of an epoch.

An epoch is a list of slots, a function of the seed, the epoch and the manifest alone. Slots are numbered through all
epochs, and global batch k is slots kB to kB+B-1 whatever the number of workers: so one integer, k, is the whole
position of a run. An epoch fills whole batches; where its samples do not, its last batch ends in empty slots.

All randomness comes from NumPy's bit generators and seed sequences, whose streams are the same in every release.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer, UInt64

EMPTY = -1
"""Row of an empty slot, and slot of a row that only pads a micro-batch."""
WINDOW_BATCHES = 50
"""Global batches whose samples are sorted by length together."""

_FRACTION, _SHUFFLE, _BATCHES, _REFILL = range(4)  # one stream of random numbers for each use


class EpochOrder:
    """Maps slots to manifest rows, for all epochs.

    Args:
        sources: index of every manifest row's source.
        lengths: tokens of every row, estimates allowed.
        weights: passes over each source in an epoch; 2.5 is two copies of each row and half of the rows once more.
        global_batch: slots in a global batch (B).
        seed: of everything drawn here.
        rows: the rows to use, such as the training side of a split; None means all.

    Raises:
        ValueError: no row is left.
    """

    def __init__(
        self,
        sources: Integer[np.ndarray, " rows"],
        lengths: Integer[np.ndarray, " rows"],
        weights: Sequence[float],
        *,
        global_batch: int,
        seed: int,
        rows: Integer[np.ndarray, " used"] | None = None,
    ) -> None:
        self.global_batch, self.seed = global_batch, seed
        self._sources, self._lengths, self._weights = np.asarray(sources), np.asarray(lengths), tuple(weights)
        used = np.arange(len(self._sources)) if rows is None else np.sort(np.asarray(rows, dtype=np.int64))
        self._members = [used[self._sources[used] == source] for source in range(len(self._weights))]
        self.samples_per_epoch = sum(
            int(weight) * len(members) + round(weight % 1 * len(members))
            for weight, members in zip(self._weights, self._members, strict=True)
        )
        if not self.samples_per_epoch:
            raise ValueError("no sample has a weight above 0")
        self._cached: dict[int, Int64[np.ndarray, " slots"]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_cached": {}}

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in an epoch; the last may be short."""
        return -(-self.samples_per_epoch // self.global_batch)

    @property
    def slots_per_epoch(self) -> int:
        """Slots in an epoch, empty ones at its end included."""
        return self.batches_per_epoch * self.global_batch

    def row(self, slot: int) -> int:
        """The manifest row in a slot, or `EMPTY`."""
        if slot < 0:
            return EMPTY
        epoch, place = divmod(slot, self.slots_per_epoch)
        return int(self.rows(epoch)[place])

    def rows(self, epoch: int) -> Int64[np.ndarray, " slots"]:
        """The manifest rows of an epoch's slots, in order; `EMPTY` in those after its last sample."""
        rows = self._cached.get(epoch)
        if rows is None:
            rows = self._arrange(epoch)
            # Two, because where epochs meet, slots of both are loaded at once, perhaps on several threads.
            self._cached = {epoch: rows, **dict(list(self._cached.items())[:1])}
        return rows

    def batch(self, step: int) -> Int64[np.ndarray, " samples"]:
        """The slots of global batch `step` that hold a sample: B of them, fewer in an epoch's last batch."""
        start = step * self.global_batch
        epoch, place = divmod(start, self.slots_per_epoch)
        return start + np.flatnonzero(self.rows(epoch)[place : place + self.global_batch] != EMPTY)

    def micro_batches(
        self, step: int, *, rank: int, world_size: int, micro_batch: int
    ) -> Int64[np.ndarray, "turns samples"]:
        """One rank's share of global batch `step`.

        Every rank has the same number of micro-batches, and all of a run have the same number of rows: `micro_batch`,
        or fewer where that divides the global batch better. `EMPTY` stands where slots are missing. A batch comes
        sorted by length, and neighbours go to the same micro-batch and to the same turn of all ranks: little is
        padded, and ranks wait little for each other.
        """
        slots = self.batch(step)
        per_rank = -(-self.global_batch // world_size)
        width = -(-per_rank // -(-per_rank // micro_batch))
        turns = -(-len(slots) // (world_size * width))
        padded = np.full((turns * world_size, width), EMPTY, dtype=np.int64)
        for row, share in zip(padded, np.array_split(slots, turns * world_size), strict=True):
            row[: len(share)] = share
        return padded.reshape(turns, world_size, width)[:, rank]

    def refill(self, slot: int, attempt: int) -> int | None:
        """The row that takes a slot whose sample was rejected.

        Args:
            slot: a slot that holds a sample.
            attempt: 1 for the first try; each gives a row that the slot has not had.

        Returns:
            A row of the same source; None when the source has no other.
        """
        epoch, place = divmod(slot, self.slots_per_epoch)
        members = self._members[self._sources[self.rows(epoch)[place]]]
        tried = [int(np.searchsorted(members, self.rows(epoch)[place]))]
        for turn in range(1, attempt + 1):
            num_left = len(members) - len(tried)
            if num_left == 0:
                return None
            pick = int(_random(1, self.seed, _REFILL, epoch, place, turn)[0] % np.uint64(num_left))
            for earlier in sorted(tried):
                pick += pick >= earlier
            tried.append(pick)
        return int(members[tried[-1]])

    def _arrange(self, epoch: int) -> Int64[np.ndarray, " slots"]:
        chosen = np.concatenate([self._repeat(source, epoch) for source in range(len(self._weights))])
        shuffled = chosen[_permutation(len(chosen), self.seed, _SHUFFLE, epoch)]
        # The short batch is cut off the shuffle's end before anything is sorted, so it is a fair draw of all lengths.
        num_full = len(shuffled) // self.global_batch * self.global_batch
        window = WINDOW_BATCHES * self.global_batch
        blocks = [shuffled[at : min(at + window, num_full)] for at in range(0, num_full, window)]
        blocks = [block[np.argsort(self._lengths[block], kind="stable")] for block in blocks]
        batches = np.concatenate(blocks or [shuffled[:0]]).reshape(-1, self.global_batch)
        batches = batches[_permutation(len(batches), self.seed, _BATCHES, epoch)]
        rest = shuffled[num_full:]
        rest = rest[np.argsort(self._lengths[rest], kind="stable")]
        slots = np.full(self.slots_per_epoch, EMPTY, dtype=np.int64)
        slots[:num_full] = batches.reshape(-1)
        slots[num_full : num_full + len(rest)] = rest
        return slots

    def _repeat(self, source: int, epoch: int) -> Int64[np.ndarray, " n"]:
        """A source's rows in an epoch: whole copies, and a share that walks through a fixed shuffle of it.

        So a weight of 0.5 shows every row once in two epochs, and none twice.
        """
        members, weight = self._members[source], self._weights[source]
        num_extra = round(weight % 1 * len(members))
        walk = _permutation(len(members), self.seed, _FRACTION, source)
        extra = walk[(epoch * num_extra + np.arange(num_extra)) % max(len(members), 1)]
        return np.concatenate([np.tile(members, int(weight)), members[extra]])


def _random(count: int, *key: int) -> UInt64[np.ndarray, " n"]:
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.asarray(raw, dtype=np.uint64)


def _permutation(count: int, *key: int) -> Int64[np.ndarray, " n"]:
    return np.argsort(_random(count, *key), kind="stable")
