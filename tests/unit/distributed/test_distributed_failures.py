"""Final errors: left for the process that started the workers, and raised by a rank that has one alone."""

import threading
import time
from pathlib import Path

import pytest

from valley.distributed.failures import end_together, forget_failure, read_failure
from valley.errors import DivergedError, ModelError, StorageError

ALONE = {"rank": 0, "world_size": 1}


def diverge() -> None:
    raise DivergedError(7, 1.0, float("nan"), ["a"])


def find_no_model() -> None:
    time.sleep(0.3)
    raise ModelError("no such tower")


def test_a_rank_alone_with_a_final_error_leaves_it_and_raises_it_when_the_others_have_none(tmp_path: Path) -> None:
    with pytest.raises(DivergedError):
        end_together(diverge, tmp_path, rank=1, world_size=2, patience_s=0.2)
    left = read_failure(tmp_path)
    assert isinstance(left, DivergedError)
    assert (left.step, left.sample_ids) == (7, ("a",))


def test_ranks_that_all_have_one_return_and_the_lowest_ranks_is_told(tmp_path: Path) -> None:
    late = threading.Thread(target=end_together, args=(find_no_model, tmp_path), kwargs={"rank": 2, "world_size": 3})
    late.start()
    other = threading.Thread(target=end_together, args=(diverge, tmp_path), kwargs={"rank": 10, "world_size": 3})
    other.start()
    end_together(diverge, tmp_path, rank=11, world_size=3)
    late.join()
    other.join()
    assert isinstance(read_failure(tmp_path), ModelError)


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
