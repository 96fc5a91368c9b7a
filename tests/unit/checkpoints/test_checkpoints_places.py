"""Checkpoints in an object store: no renames, no folders, no half-written objects."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from checkpoint_makers import fill, write
from fsspec.implementations.memory import MemoryFileSystem

from valley.checkpoints import store
from valley.checkpoints.fragments import MASTER, Fragment, FragmentReader, copy_fragments, write_fragments
from valley.checkpoints.places import Place, on_disk, to_fill, to_place
from valley.checkpoints.writer import Writer
from valley.errors import CheckpointError, SettingsError


@pytest.fixture
def bucket() -> Iterator[Place]:
    """A place in an object store that this process keeps in memory."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield to_place("memory://bucket/run")
    MemoryFileSystem.store.clear()


def test_a_checkpoint_in_an_object_store_reads_back_whole(bucket: Place) -> None:
    path = write(bucket, 7, loss=0.5)

    found = store.newest_complete(bucket)

    assert found is not None
    assert (str(found.path), found.step, found.validation_loss) == ("memory://bucket/run/step-00000007", 7, 0.5)
    assert sorted(found.files) == ["rank-00000/nested/state.bin", "rank-00000/weights.bin"]
    with on_disk(path / "rank-00000" / "weights.bin") as copy:
        assert (copy.name, copy.read_text()) == ("weights.bin", "weights")
    assert not copy.exists()


@pytest.mark.parametrize("damage", ["no manifest", "another byte", "no file"])
def test_what_is_not_whole_in_an_object_store_is_passed_over(bucket: Place, damage: str) -> None:
    write(bucket, 1)
    newer = write(bucket, 2)
    if damage == "no manifest":
        (newer / store.MANIFEST).unlink()
    elif damage == "another byte":
        (newer / "rank-00000" / "weights.bin").write_text("weightz")
    else:
        (newer / "rank-00000" / "weights.bin").unlink()

    found = store.newest_complete(bucket)

    assert found is not None
    assert found.step == 1


def test_an_upload_that_fails_leaves_no_manifest_and_says_what_failed(bucket: Place) -> None:
    write(bucket, 1)

    def fail(folder: Path) -> None:
        fill(folder, "half")
        raise OSError(28, "No space left on device")

    writer = Writer(bucket)
    writer.start(2, fail, {})
    with pytest.raises(CheckpointError, match="No space left"):
        writer.finish()

    assert [checkpoint.step for checkpoint in store.complete(bucket)] == [1]
    assert not [path for path in MemoryFileSystem.store if "step-00000002" in path]


def test_the_last_and_the_best_stay_in_an_object_store(bucket: Place) -> None:
    for step, loss in [(10, 1.0), (20, 3.0), (30, 2.0)]:
        write(bucket, step, loss)

    store.prune(bucket, keep_last=1)

    assert [step for step, _ in store.steps_in(bucket)] == [30, 10]
    remaining = [path for path in MemoryFileSystem.store if "step-00000020" in path]
    assert not remaining


def test_only_the_bytes_asked_for_are_fetched(bucket: Place, tmp_path: Path) -> None:
    values = torch.randn(1000)
    fragments = [Fragment("weight", offset, {MASTER: values[offset : offset + 500]}) for offset in (0, 500)]
    files: list[Place] = []
    for rank, fragment in enumerate(fragments):
        local = tmp_path / f"{rank}.safetensors"
        write_fragments(local, copy_fragments([fragment]), optimizer_steps=3)
        files.append(bucket / local.name)
        files[-1].write_bytes(local.read_bytes())

    reader = FragmentReader(files)

    assert reader.optimizer_steps == 3
    assert torch.equal(reader.read("weight", MASTER, 490, 20), values[490:510])


def test_a_file_uri_is_a_folder_and_an_unknown_protocol_is_a_settings_error(tmp_path: Path) -> None:
    assert to_place(f"file://{tmp_path}/run") == tmp_path / "run"
    with pytest.raises(SettingsError, match="nosuch"):
        to_place("nosuch://bucket/run")


def test_a_store_that_fails_is_not_taken_for_an_empty_one(bucket: Place) -> None:
    write(bucket, 1)

    class Failing(MemoryFileSystem):
        """Refuses to list."""

        protocol = "failing"

        def ls(self, path: str, detail: bool = True, **others: object) -> list[object]:
            raise PermissionError(13, "listing is forbidden", path)

    fsspec.register_implementation("failing", Failing, clobber=True)
    with pytest.raises(OSError, match="may not be read"):
        store.complete(to_place("failing://bucket/run"))


def test_what_a_killed_upload_left_on_the_disk_is_cleared_by_the_next(bucket: Place, tmp_path: Path) -> None:
    folder = bucket / "step-00000001" / "rank-00000"
    with to_fill(folder) as first:
        (first / "part.bin").write_text("left")
        copied = shutil.copytree(first, tmp_path / "left")
    shutil.copytree(copied, first)  # as if the block had never ended

    with to_fill(bucket / "step-00000002" / "rank-00000") as second:
        assert second == first
        assert list(second.iterdir()) == []
