"""A run that was killed goes on as if nothing had happened: the same numbers, the same samples, each once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from killable_run import OLDEST_GONE_ON_FROM
from mlflow import MlflowClient
from safetensors.torch import load_file
from training_makers import run_ranks, run_settings, write_data

from valley.checkpoints import store
from valley.checkpoints.export import export_model
from valley.errors import CheckpointError, SettingsError
from valley.training.job import Job, checkpoints_of, open_job, prepare_job
from valley.training.record import RunRecord, read_record
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.summary import read_summary
from valley.training.tracking import read_curve

RUN = Path(__file__).with_name("killable_run.py")
STEPS_PER_EPOCH = 5


def settings_in(folder: Path, **changes: Any) -> RunSettings:
    """Twenty samples, one of them broken, in five steps an epoch; four epochs."""
    folder.mkdir(exist_ok=True)
    sources = [write_data(folder, "pictures", 12), write_data(folder, "words", 8, pictures=False)]
    (folder / "pictures-4.png").write_bytes(b"broken")
    settings = run_settings(folder, sources, data={"sources": [{"path": str(path)} for path in sources]}, **changes)
    return settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 4})})


def run_apart(settings: RunSettings, log: Path, *last_step: str) -> int:
    """Runs in a process of its own; its exit status, negative if a signal ended it."""
    file = log.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    command = [sys.executable, str(RUN), str(file), str(log), *last_step]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200, check=False).returncode


def losses(settings: RunSettings) -> dict[int, float]:
    return read_curve(Path(settings.output) / "metrics.jsonl", "train/loss")


def weights(settings: RunSettings) -> dict[str, torch.Tensor]:
    return load_file(Path(settings.output) / "model" / "model.safetensors")


def record_of(settings: RunSettings) -> RunRecord | None:
    return read_record(checkpoints_of(settings))


def consumed(log: Path) -> list[tuple[int, str]]:
    return [(int(slot), name) for slot, name in map(str.split, log.read_text().splitlines())]


@pytest.mark.parametrize(
    ("engine", "every_steps"),
    [("torch", 3), ("torch", STEPS_PER_EPOCH), pytest.param("deepspeed", 3, marks=pytest.mark.slow)],
    ids=str,
)
def test_killed_and_started_again_a_run_ends_in_the_same_bits(engine: str, every_steps: int, tmp_path: Path) -> None:
    changes = {"engine": {"name": engine, "overlap_comm": False}, "checkpoint": {"every_steps": every_steps}}
    straight, broken = (settings_in(tmp_path / name, **changes) for name in ("straight", "broken"))
    assert run_apart(straight, tmp_path / "straight.log") == 0
    assert run_apart(broken, tmp_path / "first.log", "8") == -signal.SIGKILL
    assert run_apart(broken, tmp_path / "second.log") == 0

    record = record_of(broken)
    assert record is not None
    went_on_from = record.starts[1].step
    assert went_on_from >= OLDEST_GONE_ON_FROM
    assert went_on_from % every_steps == 0
    assert losses(broken) == losses(straight)
    assert list(losses(broken)) == list(range(1, 4 * STEPS_PER_EPOCH + 1))
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(broken).items())
    kept = [(slot, name) for slot, name in consumed(tmp_path / "first.log") if slot < went_on_from * 4]
    assert kept + consumed(tmp_path / "second.log") == consumed(tmp_path / "straight.log")
    assert len({slot for slot, _ in consumed(tmp_path / "straight.log")}) == 4 * STEPS_PER_EPOCH * 4
    for key in ("loss_first", "loss_last", "steps", "samples", "tokens", "frames", "rejected"):
        assert read_summary(Path(broken.output))[key] == read_summary(Path(straight.output))[key]


class StopError(Exception):
    """What ends a run in the middle."""


def run_until(settings: RunSettings, last: int | None) -> None:
    """Runs until the checkpoint after `last` steps is there, which may be when the next is being written; or to the end."""
    train_until(open_job(prepare_job(settings)), last)


def train_until(job: Job, last: int | None) -> None:
    """Is one rank of `run_until`: a job is opened once, by whoever starts the ranks."""
    torch.set_num_threads(1)

    def report(checkpoint: Path) -> None:
        if checkpoint.name == f"step-{last or 0:08d}":
            raise StopError

    try:
        train_rank(job, device=torch.device("cpu"), report=report)
    except StopError:
        for thread in threading.enumerate():  # the one being written is finished behind a stopped run
            if thread.name.startswith("checkpoint"):
                thread.join()


def test_another_number_of_workers_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    changes = {"checkpoint": {"every_steps": 4}}
    straight, changed = (settings_in(tmp_path / name, **changes) for name in ("straight", "changed"))
    run_until(straight, None)
    (tmp_path / "ranks").mkdir()
    run_ranks(2, train_until, open_job(prepare_job(changed)), 8, folder=tmp_path / "ranks")
    run_until(changed, None)

    record = record_of(changed)
    assert record is not None
    first, second = record.starts
    assert (first.step, first.num_workers, second.num_workers) == (0, 2, 1)
    assert second.step in (8, 12)
    assert list(losses(changed).values()) == pytest.approx(list(losses(straight).values()), abs=1e-3)


def test_a_run_that_goes_on_stays_one_run_and_shows_it(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "run", checkpoint={"every_steps": 4}, tracking={"enabled": True})
    run_until(settings, 4)
    first = record_of(settings)
    run_until(settings, None)

    summary = read_summary(Path(settings.output))
    assert first is not None
    assert first.mlflow is not None
    assert summary["mlflow_run_id"] == first.mlflow.run_id
    restarts = MlflowClient(first.mlflow.uri).get_metric_history(first.mlflow.run_id, "run/restarts")
    assert [point.value for point in restarts] == [0, 1]
    assert restarts[1].step in (4, 8)


def test_what_was_finished_is_done_anew_and_what_was_not_under_other_settings_is_refused(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "run", checkpoint={"every_steps": 4})
    faster = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 0.5})})
    run_until(settings, 4)
    with pytest.raises(SettingsError) as caught:
        open_job(prepare_job(faster))
    assert "holds an unfinished run" in caught.value.problems[0]
    assert caught.value.problems[1:] == ("train.learning_rate: 0.01, now 0.5",)

    anew = faster.model_copy(update={"checkpoint": faster.checkpoint.model_copy(update={"resume": False})})
    run_until(anew, None)
    assert (Path(settings.output) / "checkpoints.previous" / "step-00000004").is_dir()
    run_until(settings, 4)
    record = record_of(settings)
    assert record is not None
    assert record.starts[0].step == 0
    assert json.loads(record.identity["train.learning_rate"]) == 0.01


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """A place in an object store that this process keeps in memory, of this test alone."""
    yield f"memory://{tmp_path.name}/run"
    MemoryFileSystem.store.clear()


def test_a_machine_lost_with_its_disk_loses_nothing_that_lies_in_an_object_store(tmp_path: Path, bucket: str) -> None:
    straight = settings_in(tmp_path / "straight", checkpoint={"every_steps": 4})
    lost = settings_in(tmp_path / "lost", checkpoint={"every_steps": 4, "path": bucket}, tracking={"enabled": True})
    run_until(straight, None)
    run_until(lost, 8)
    first = record_of(lost)
    shutil.rmtree(lost.output)
    elsewhere = {"uri": f"sqlite:///{tmp_path}/another-machine.db"}
    lost = lost.model_copy(update={"tracking": lost.tracking.model_copy(update=elsewhere)})
    run_until(lost, None)

    record = record_of(lost)
    assert first is not None
    assert first.mlflow is not None
    assert record is not None
    assert record.mlflow is not None
    went_on_from = record.starts[1].step
    assert went_on_from in (8, 12)
    assert losses(lost) == {step: loss for step, loss in losses(straight).items() if step > went_on_from}
    expected = weights(straight)
    assert all(torch.equal(value, expected[name]) for name, value in weights(lost).items())
    tags = MlflowClient(record.mlflow.uri).get_run(record.mlflow.run_id).data.tags
    assert tags["valley.continues"] == first.mlflow.run_id
    assert (Path(lost.output) / "settings.yaml").exists()
    newest = Path(read_summary(Path(lost.output))["training_checkpoint"]).name
    exported = export_model(f"{bucket}/{newest}", tmp_path / "exported")
    found = load_file(exported / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(SettingsError, match="is not empty"):
        open_job(prepare_job(lost))


def test_a_folder_of_other_things_is_never_moved_for_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "everyones" / "other-run").mkdir(parents=True)
    settings = settings_in(tmp_path / "run", checkpoint={"path": str(tmp_path / "everyones")})

    with pytest.raises(SettingsError, match="is not empty"):
        open_job(prepare_job(settings))

    assert [path.name for path in (tmp_path / "everyones").iterdir()] == ["other-run"]


def test_a_damaged_newest_checkpoint_costs_only_itself(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "run", checkpoint={"every_steps": 4, "keep_last": 2})
    run_until(settings, 8)
    root = Path(settings.output) / "checkpoints"
    newest, before = store.complete(root)[:2]
    state = newest.path / "rank-00000" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    run_until(settings, None)

    record = record_of(settings)
    assert record is not None
    assert record.starts[1].step == before.step
    kept = store.complete(root)
    assert [checkpoint.step for checkpoint in kept[:2]] == [20, 16]
    for checkpoint in kept:
        store.verify(checkpoint)


@pytest.mark.parametrize("trouble", ["all are damaged", "storage fails"])
def test_a_run_whose_checkpoints_cannot_be_read_stops_instead_of_beginning_anew(tmp_path: Path, trouble: str) -> None:
    settings = settings_in(tmp_path / "run", checkpoint={"every_steps": 4})
    run_until(settings, 4)
    for checkpoint in store.complete(Path(settings.output) / "checkpoints"):
        state = Path(checkpoint.path) / "rank-00000" / "state.safetensors"
        if trouble == "storage fails":  # of the right size, and reading it is an error
            size = state.stat().st_size
            state.unlink()
            state.mkdir()
            manifest = Path(checkpoint.path) / store.MANIFEST
            manifest.write_text(
                manifest.read_text().replace(f'"num_bytes": {size}', f'"num_bytes": {state.stat().st_size}')
            )
        else:
            state.write_bytes(b"?" * state.stat().st_size)

    with pytest.raises(CheckpointError, match="could not be read" if trouble == "storage fails" else "is whole"):
        run_until(settings, None)

    assert losses(settings)[4] > 0


def test_another_frozen_part_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "run", checkpoint={"every_steps": 4})
    run_until(settings, 4)
    for checkpoint in store.complete(Path(settings.output) / "checkpoints"):
        manifest = Path(checkpoint.path) / store.MANIFEST
        manifest.write_text(manifest.read_text().replace(checkpoint.info["frozen"]["llm"]["sha256"], "0" * 64))

    with pytest.raises(CheckpointError, match="the frozen part 'llm'"):
        run_until(settings, None)


def test_a_start_without_tracking_does_not_forget_the_mlflow_run(tmp_path: Path) -> None:
    settings = settings_in(tmp_path / "run", checkpoint={"every_steps": 4}, tracking={"enabled": True})
    run_until(settings, 4)
    first = record_of(settings)
    untracked = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"enabled": False})})
    run_until(untracked, 8)

    second = record_of(settings)
    assert first is not None
    assert second is not None
    assert first.mlflow is not None
    assert second.mlflow == first.mlflow
