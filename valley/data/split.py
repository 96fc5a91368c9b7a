"""Which rows are held out for validation: a seeded share of every source, with no medium on both sides.

Datasets ask many questions about one clip. Split by record, the model would be validated on clips it has learnt from;
so rows that share a medium, directly or through others, stay together.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64, Integer, UInt64

_GOLDEN = 0x9E3779B97F4A7C15


def split_rows(
    sources: Integer[np.ndarray, " rows"],
    media_rows: Integer[np.ndarray, " media"],
    media_keys: UInt64[np.ndarray, " media"],
    *,
    fraction: float,
    seed: int,
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " held_out"]]:
    """Splits a manifest's rows in two.

    Args:
        sources: every row's source.
        media_rows: the row that each medium belongs to; every row has at least one (text-only rows: their text).
        media_keys: what identifies each medium; equal keys are the same medium.
        fraction: share of every source to hold out. What is held out comes as close to it as whole groups of rows
            allow; the last group of a source is never held out.
        seed: which groups are drawn; adding records does not change what is drawn among the old ones' groups.

    Returns:
        The rows to train on and the rows held out, both ascending.
    """
    groups = _group_rows(len(sources), media_rows, media_keys)
    first_rows, group_of_row = np.unique(groups, return_inverse=True)
    # A group is known by the smallest key in it, and belongs to the source of its first row.
    names = np.full(len(first_rows), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(names, group_of_row[media_rows], media_keys)
    held_out = np.zeros(len(first_rows), dtype=bool)
    for source in np.unique(sources):
        members = np.flatnonzero(sources[first_rows] == source)
        if not len(members):
            continue
        members = members[np.argsort(_scramble(names[members], seed), kind="stable")]
        sizes = np.bincount(group_of_row[sources == source], minlength=len(first_rows))[members]
        reached = np.cumsum(sizes) - sizes
        held_out[members[: np.argmin(np.abs(reached - fraction * sizes.sum()))]] = True
    side = held_out[group_of_row]
    return np.flatnonzero(~side), np.flatnonzero(side)


def _group_rows(
    num_rows: int, media_rows: Integer[np.ndarray, " media"], media_keys: UInt64[np.ndarray, " media"]
) -> Int64[np.ndarray, " rows"]:
    """The first row of every row's group: groups are the connected parts of the graph of rows and media."""
    _, medium = np.unique(media_keys, return_inverse=True)
    first = np.arange(num_rows)
    while True:
        of_medium = np.full(medium.max(initial=-1) + 1, num_rows)
        np.minimum.at(of_medium, medium, first[media_rows])
        nearer = first.copy()
        np.minimum.at(nearer, media_rows, of_medium[medium])
        if np.array_equal(nearer, first):
            return first
        first = nearer


def _scramble(keys: UInt64[np.ndarray, " n"], seed: int) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's finaliser: a seeded order of the keys that has nothing to do with what they stand for."""
    mixed = keys + np.uint64((seed + 1) * _GOLDEN % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
