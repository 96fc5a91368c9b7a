"""A checkpoint is whole or it is ignored, whatever happens while it is written."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from checkpoint_makers import fill, write

from valley.checkpoints import store
from valley.checkpoints.writer import Writer
from valley.errors import CheckpointError


def steps(root: Path) -> list[int]:
    return [step for step, _ in store.steps_in(root)]


def test_a_written_checkpoint_reads_back_with_every_file_and_what_was_said(tmp_path: Path) -> None:
    path = write(tmp_path, 7, loss=0.5)

    found = store.newest_complete(tmp_path)

    assert found is not None
    assert (found.path, found.step, found.world_size, found.validation_loss) == (path, 7, 1, 0.5)
    assert sorted(found.files) == ["rank-00000/nested/state.bin", "rank-00000/weights.bin"]
    assert found.files["rank-00000/weights.bin"].num_bytes == len("weights")
    assert (found.rank_folder(0) / "weights.bin").read_text() == "weights"


def test_without_a_manifest_the_newest_complete_is_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newer = write(tmp_path, 2)
    (newer / store.MANIFEST).unlink()

    found = store.newest_complete(tmp_path)

    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("damage", ["flip a byte", "cut", "remove"])
def test_a_damaged_file_makes_the_checkpoint_none(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / "rank-00000" / "weights.bin"
    if damage == "flip a byte":
        file.write_text("weightz")
    elif damage == "cut":
        file.write_text("weigh")
    else:
        file.unlink()

    with pytest.raises(CheckpointError, match=r"weights\.bin"):
        store.verify(store.read(file.parents[1]))
    found = store.newest_complete(tmp_path)
    assert found is not None
    assert found.step == 1


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert store.newest_complete(tmp_path) is None
    assert store.newest_complete(tmp_path / "nothing") is None


def test_writing_a_step_again_leaves_nothing_of_the_first_attempt(tmp_path: Path) -> None:
    leftover = tmp_path / "step-00000003" / "rank-00001"
    leftover.mkdir(parents=True)
    (leftover / "stale.bin").write_text("from a larger world")

    path = write(tmp_path, 3)

    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "rank-00000"]


def test_the_last_two_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, float("nan")), (50, None), (60, 1.5)]:
        write(tmp_path, step, loss)

    removed = store.prune(tmp_path, keep_last=2)

    assert steps(tmp_path) == [60, 50, 20]
    assert sorted(int(path.name[-8:]) for path in removed) == [10, 30, 40]
    best = store.best_complete(tmp_path)
    assert best is not None
    assert best.step == 20


def test_pruning_clears_old_wrecks_but_not_what_may_be_in_the_making(tmp_path: Path) -> None:
    for wreck in ["step-00000005", "step-00000099"]:
        (tmp_path / wreck / "rank-00000").mkdir(parents=True)
    write(tmp_path, 10)

    store.prune(tmp_path, keep_last=1)

    assert steps(tmp_path) == [99, 10]


def test_a_failure_on_another_rank_is_an_error_here_and_no_checkpoint(tmp_path: Path) -> None:
    votes = iter([True, False])
    writer = Writer(tmp_path, world_size=2, agree=lambda ok: ok and next(votes))
    writer.start(1, lambda folder: None, {})

    with pytest.raises(CheckpointError, match="another rank failed"):
        writer.finish()

    assert store.newest_complete(tmp_path) is None


def test_a_failure_here_is_told_to_the_others_before_it_is_raised(tmp_path: Path) -> None:
    told: list[bool] = []

    def agree(ok: bool) -> bool:
        told.append(ok)
        return ok

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    writer = Writer(tmp_path, agree=agree)
    writer.start(1, fail, {})
    with pytest.raises(CheckpointError, match="No space left"):
        writer.finish()

    assert told == [True, False]


def test_an_earlier_runs_checkpoints_are_moved_not_mixed(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    write(root, 500)

    aside = store.set_aside(root)

    assert aside == tmp_path / "checkpoints.previous"
    assert steps(aside) == [500]
    assert steps(root) == []
    assert store.set_aside(root) is None


def test_a_published_folder_replaces_the_one_before_and_a_failure_leaves_it(tmp_path: Path) -> None:
    target = tmp_path / "model"
    store.publish(target, lambda folder: fill(folder, "first"))
    store.publish(target, lambda folder: fill(folder, "second"))

    def fail(folder: Path) -> None:
        (folder / "weights.bin").write_text("third")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.publish(target, fail)

    assert (target / "weights.bin").read_text() == "second"


def _write_for_ever(root: Path, first: int, progress: Connection) -> None:
    writer = Writer(root, completed=lambda: store.prune(root, keep_last=2))
    for step in itertools.count(first):
        content = bytes([step % 251]) * 300_000

        def fill(folder: Path, content: bytes = content) -> None:
            for index in range(4):
                (folder / f"{index}.bin").write_bytes(content)

        if before := writer.start(step, fill, {"step": step}):
            progress.send(int(before.name.removeprefix("step-")))


def test_killed_at_any_moment_the_newest_complete_is_the_last_one_finished_or_newer(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    last = 0
    for attempt in range(50):
        receiver, sender = fork.Pipe(duplex=False)
        writer = fork.Process(target=_write_for_ever, args=(tmp_path, last + 1, sender), daemon=True)
        writer.start()
        # Two whole checkpoints, then the kill lands somewhere inside the next ones: a little later each time.
        for _ in range(2):
            last = receiver.recv()
        for number in range(attempt * 200):
            json.dumps(number)
        writer.kill()
        writer.join()

        found = store.newest_complete(tmp_path)

        assert found is not None
        assert found.step >= last
        expected = bytes([found.step % 251]) * 300_000
        assert all((found.rank_folder(0) / f"{index}.bin").read_bytes() == expected for index in range(4))
        last = found.step
