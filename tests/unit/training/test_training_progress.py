"""A run says where it is: a bar on a terminal, few lines elsewhere, nothing on other ranks; at the end, a summary."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from valley.data.rejects import Reject
from valley.training.loop import FitResult
from valley.training.meter import Totals
from valley.training.progress import Bar, Lines, Moment, Silent, following, make_progress
from valley.training.stage import ModuleRow
from valley.training.summary import format_summary, read_summary, summarise, write_summary

REJECT = Reject(3, "a", "mine", "/a.mp4", "decode", "EmptyMediaError", "no bytes", 0.1)


def moment(step: int) -> Moment:
    return Moment(step, loss=1.25, learning_rate=2e-3, samples_per_s=41.7, wait_share=0.034)


def test_without_a_terminal_the_first_and_last_step_are_lines() -> None:
    out = io.StringIO()
    lines = Lines(100, stream=out, every_s=3600)

    for step in range(1, 101):
        lines.update(moment(step))

    first, last = out.getvalue().splitlines()
    assert first.startswith("step 1/100: loss 1.2500, lr 2.00e-03, 41.7 samples/s, waiting for data 3%")
    assert last.startswith("step 100/100: ")
    assert last.endswith("0:00:00 left")


def test_lines_come_as_often_as_asked() -> None:
    out = io.StringIO()
    lines = Lines(5, stream=out, every_s=0)

    for step in range(1, 6):
        lines.update(moment(step))

    assert len(out.getvalue().splitlines()) == 5


def test_a_bar_shows_the_figures_and_goes_on_from_where_a_run_began() -> None:
    out = io.StringIO()
    bar = Bar(10, first_step=4, stream=out)

    bar.update(moment(5))
    bar.say("step 5: validation loss 0.9")
    bar.close()

    assert "5/10" in out.getvalue()
    assert "loss 1.2500, lr 2.00e-03, 41.7 samples/s, waiting for data 3%" in out.getvalue()
    assert "validation loss 0.9\n" in out.getvalue()


def test_a_run_is_shown_from_outside_as_its_lines_are_written(tmp_path: Path) -> None:
    curves, out = tmp_path / "metrics.jsonl", io.StringIO()
    with following(curves, 3, Lines(3, stream=out, every_s=0), every_s=0.01):
        curves.write_text(line(1) + json.dumps({"step": 1, "validation/loss": 0.5}) + "\n" + line(2)[:10])
        give_up_s = time.monotonic() + 30
        while "step 1/3" not in out.getvalue() and time.monotonic() < give_up_s:
            time.sleep(0.01)
        with curves.open("a") as file:
            file.write(line(2)[10:] + line(3))

    assert [text.partition(":")[0] for text in out.getvalue().splitlines()] == ["step 1/3", "step 2/3", "step 3/3"]
    assert out.getvalue().count("lr 5.00e-01") == 3


def line(step: int) -> str:
    names = ("train/loss", "train/learning_rate/llm", "speed/samples_per_s", "data/wait_share")
    return json.dumps({"step": step, "train/learning_rate/temporal": 0.25, **dict.fromkeys(names, 0.5)}) + "\n"


def test_other_ranks_are_silent() -> None:
    assert isinstance(make_progress(10, 0, rank=3), Silent)


def test_the_summary_divides_by_the_time_spent_in_steps_and_holds_no_nan(tmp_path: Path) -> None:
    totals = Totals(
        num_steps=4,
        num_samples=30,
        num_tokens=900,
        num_places=1000,
        num_frames=60,
        seconds=2.5,
        later_s=1.6,
        later_samples=24,
        later_frames=48,
        later_wait_s=0.4,
    )
    result = FitResult(totals, loss_first=3.0, loss_last=float("nan"), best_loss=1.5, best_step=2, validation_loss=1.75)

    summary = summarise(
        result,
        parts=[ModuleRow("temporal", 7, 7, "float32", 0.1), ModuleRow("vision", 5, 0, "float32", None)],
        model=Path("/m"),
        checkpoint=Path("/c"),
        best_checkpoint=None,
        rejects=[REJECT, REJECT],
        rejects_table=Path("/t"),
        mlflow=None,
    )
    write_summary(tmp_path, summary)

    found = read_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail) == found
    assert (found["loss_first"], found["loss_last"]) == (3.0, None)
    assert (found["samples_per_s"], found["frames_per_s"], found["data_wait_share"]) == (15.0, 30.0, 0.25)
    assert (found["parameters"], found["trainable_parameters"]) == ({"temporal": 7, "vision": 5}, 7)
    assert (found["padding_share"], found["rejected"], found["checkpoint"]) == (0.1, 2, "/m")
    assert "2 (2 EmptyMediaError): /t" in format_summary(found)
    assert "3.0000 at first, not finite at last; validation 1.7500, best 1.5000 at step 2" in format_summary(found)
