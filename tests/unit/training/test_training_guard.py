"""A run does not go on with numbers that are none, and a worker that is stuck does not stay."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_makers import batch, new_engine, run_settings, write_data

from valley.checkpoints import store
from valley.errors import DivergedError
from valley.training import watchdog
from valley.training.feed import Step
from valley.training.guard import Guard
from valley.training.job import open_job, prepare_job
from valley.training.meter import Counts, Figures
from valley.training.run import train_rank
from valley.training.watchdog import STUCK

STEP = Step(6, (batch([0, 1]), batch([2])))


def figures(loss: float, norm: float = 1.0) -> Figures:
    counts = Counts(1, 3, 10, 10, 4, 0.0, 0)
    return Figures(counts, loss, norm, {"projector": 0.1}, 1.0, 0.0, 1, None)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_a_step_that_is_not_finite_stops_the_run_and_names_its_samples(
    loss: float, norm: float, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match=r"^step 7: .* Its samples: s0, s1, s2$") as caught:
        Guard(new_engine("torch"), tmp_path, 1.5).judge(STEP, figures(loss, norm))
    assert caught.value.sample_ids == ("s0", "s1", "s2")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_jump_of_the_loss_is_written_down_with_its_samples(tmp_path: Path) -> None:
    guard = Guard(new_engine("torch"), tmp_path, 1.5)
    for loss in [9.0, 13.0, *[2.0] * 49, 2.9]:  # the first steps teach what is usual; it is forgotten after fifty
        guard.judge(STEP, figures(loss))
    assert not (tmp_path / "spikes.jsonl").exists()

    guard.judge(STEP, figures(6.1))

    (spike,) = map(json.loads, (tmp_path / "spikes.jsonl").read_text().splitlines())
    assert spike == {"step": 7, "loss": 6.1, "highest": 2.9, "samples": ["s0", "s1", "s2"]}


def test_the_checkpoint_before_a_diverged_step_is_kept(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, [write_data(tmp_path, "words", 12)], checkpoint={"every_steps": 1})
    wild = settings.train.model_copy(update={"learning_rate": 1e30, "epochs": 4})
    job = open_job(prepare_job(settings.model_copy(update={"train": wild})))

    with pytest.raises(DivergedError) as caught:
        train_rank(job, device=torch.device("cpu"))

    newest = store.newest_complete(job.checkpoints)
    assert newest is not None
    assert 1 <= newest.step < caught.value.step
    assert not (job.folder / "summary.json").exists()


STUCK_CODE = """
import os, runpy, sys, time
from pathlib import Path
Watchdog = runpy.run_path(sys.argv[4])["Watchdog"]  # the file alone: the package would take seconds to import
def waits_for_ever():
    time.sleep(600)
if sys.argv[3] == "mute":  # until nothing more fits into the pipe
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(4096))
    except BlockingIOError:
        os.set_blocking(2, True)
with Watchdog(float(sys.argv[1]), Path(sys.argv[2])) as dog:
    if sys.argv[3] != "done":
        waits_for_ever()
"""


def watched(patience_s: float, report: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STUCK_CODE, str(patience_s), str(report), what, watchdog.__file__]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def test_a_process_that_does_nothing_for_too_long_ends_itself_and_says_where_it_stood(tmp_path: Path) -> None:
    stuck = watched(0.5, tmp_path / "stuck.txt", "stuck")
    done = watched(100, tmp_path / "done.txt", "done")
    said = stuck.communicate(timeout=200)[1]

    assert stuck.returncode == STUCK
    assert "nothing was done for 0.5 s (cluster.stuck_after_s)" in said
    assert "in waits_for_ever" in said
    assert "in waits_for_ever" in (tmp_path / "stuck.txt").read_text()
    done.communicate(timeout=200)
    assert done.returncode == 0
    assert not (tmp_path / "done.txt").exists()


def test_it_ends_itself_where_nothing_can_be_written_or_writing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    missing = watched(0.5, tmp_path / "no" / "such" / "folder" / "stuck.txt", "stuck")
    hanging = watched(0.5, tmp_path / "pipe", "stuck")  # nobody reads it: opening it never returns
    mute = watched(0.5, tmp_path / "mute.txt", "mute")

    assert mute.wait(timeout=200) == STUCK
    assert "in waits_for_ever" in (tmp_path / "mute.txt").read_text()
    for process in (missing, hanging):
        said = process.communicate(timeout=200)[1]
        assert process.returncode == STUCK
        assert "in waits_for_ever" in said
        assert "nothing was done for 0.5 s" in said
