"""A server on Ray goes on: hostile requests, a replica that is killed, an update while it is asked."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from valley.performance.load import Outcome
from valley.performance.soak import CLIENTS, KINDS, PHASES, soak_on_ray

REQUESTS = 200


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_only_the_answers_of_a_killed_replica_are_lost(tmp_path: Path) -> None:
    soak = soak_on_ray(tmp_path, REQUESTS, port=8021)

    assert len(soak.outcomes) == REQUESTS
    assert sum(one.kind.startswith("hostile") for one in soak.outcomes) == REQUESTS // 10
    lost = {place: one for place, one in enumerate(soak.outcomes) if one in soak.wrong}
    assert all(_was_cut(one) for one in lost.values()), lost
    assert len(lost) <= CLIENTS
    assert all(soak.killed_at <= place < soak.killed_at + 4 * CLIENTS for place in lost), (soak.killed_at, lost)
    assert soak.updated_at[0] >= soak.killed_at
    assert [phase for phase, _ in itertools.groupby(one.phase for one in soak.memory)] == list(PHASES)
    assert all(size > 1 << 20 for one in soak.memory for size in one.sizes.values())
    assert soak.growth.keys() == {*KINDS}
    assert all(ratio < 1.25 for ratio in soak.growth.values()), soak.growth


def _was_cut(one: Outcome) -> bool:
    """Its stream broke off, or there was no replica for it yet."""
    return not one.kind.startswith("hostile") and (one.status, one.code) in {(-1, "not_ready"), (503, "not_ready")}
