"""Final errors: left for the process that started the workers, and raised by a rank that has one alone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from valley.distributed.failures import end_together, forget_failure, read_failure
from valley.errors import DivergedError, ModelError, StorageError

ALONE = {"rank": 0, "world_size": 1}


def diverge() -> None:
    raise DivergedError(7, 1.0, float("nan"), ["a"])


def find_no_model() -> None:
    raise ModelError("no such tower")


def test_a_rank_alone_with_a_final_error_leaves_it_and_raises_it_when_the_others_have_none(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        end_together(diverge, tmp_path, rank=1, world_size=2, patience_s=0.2)
    left = read_failure(tmp_path)
    assert isinstance(left, DivergedError)
    assert (left.step, left.sample_ids) == (7, ("a",))


def test_ranks_that_all_have_one_return_and_the_lowest_ranks_is_told(tmp_path: Path) -> None:
    all_at_work = threading.Barrier(3)

    def fail(with_error: Callable[[], None]) -> None:
        all_at_work.wait(timeout=60)
        with_error()

    with ThreadPoolExecutor(3) as ranks:
        ends = [
            ranks.submit(end_together, partial(fail, with_error), tmp_path, rank=rank, world_size=3)
            for rank, with_error in ((2, find_no_model), (10, diverge), (11, diverge))
        ]
    assert [end.result() for end in ends] == [None, None, None]
    assert isinstance(read_failure(tmp_path), ModelError)


def test_a_rank_that_comes_after_anothers_final_error_does_nothing_and_is_not_waited_for(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as ranks:
        early = ranks.submit(end_together, diverge, tmp_path, rank=0, world_size=2)
        while read_failure(tmp_path) is None:
            time.sleep(0.01)
        end_together(lambda: pytest.fail("worked after the end"), tmp_path, rank=1, world_size=2)
    assert early.result() is None
    forget_failure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_workers_started_again_after_a_final_error_do_nothing(tmp_path: Path) -> None:
    end_together(diverge, tmp_path, **ALONE)
    begun = []
    end_together(lambda: begun.append("again"), tmp_path, **ALONE)
    assert begun == []
    forget_failure(tmp_path)
    assert read_failure(tmp_path) is None
    end_together(lambda: begun.append("anew"), tmp_path, **ALONE)
    assert begun == ["anew"]


def test_an_error_that_a_new_start_may_help_against_is_left_to_ray(tmp_path: Path) -> None:
    def lose_storage() -> None:
        raise StorageError("gone")

    with pytest.raises(StorageError):
        end_together(lose_storage, tmp_path, **ALONE)
    assert read_failure(tmp_path) is None
