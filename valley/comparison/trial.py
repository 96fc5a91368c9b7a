"""One trial, from its settings to its result: train, ask, and write down what it came to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valley.checkpoints.store import write_json
from valley.comparison.settings import CompareSettings
from valley.comparison.tracking import TrialRun, begin_trial_run, read_run
from valley.comparison.trials import STAGES, Trial
from valley.evaluation.evaluate import ANSWERS_FILE
from valley.evaluation.settings import EvaluationSettings
from valley.training.job import checkpoints_of
from valley.training.mlflow_tracker import MlflowRun, end_run
from valley.training.record import read_record
from valley.training.settings import RunSettings
from valley.training.summary import SUMMARY_FILE, read_summary
from valley.training.tracking import METRICS_FILE, read_curve
from valley.training.two_stages import TwoStages, run_two_stages
from valley.training.validation import ACCURACY

logger = logging.getLogger(__name__)

RESULT_FILE, STOPPED_FILE = "result.json", "stopped.json"
ASKED = {"all": "evaluation", "shuffled": "evaluation-shuffled"}
"""Folders of what was answered with the frames in order, and in a random one."""


@dataclass(frozen=True)
class Machinery:
    """How a trial's work is carried out: in this process, or on a cluster.

    Attributes:
        train: runs a stage.
        evaluate: asks a saved model.
    """

    train: Callable[[RunSettings], str]
    evaluate: Callable[[EvaluationSettings], str]


def run_trial(trial: Trial, settings: CompareSettings, parent: MlflowRun | None, machinery: Machinery) -> None:
    """Runs a trial, or what is left of it; nothing when it is finished.

    Args:
        trial: which.
        settings: of the comparison.
        parent: the comparison's MLflow run.
        machinery: carries it out.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used.
    """
    if is_finished(trial):
        return
    run = begin_trial_run(trial, parent)
    with run.status(is_stopped=lambda: is_stopped(trial)):
        stages = _tracked_below(trial.stages, run)
        if not (trial.folder / SUMMARY_FILE).exists():
            run_two_stages(stages, machinery.train)
        summary = read_summary(trial.folder)
        for frames, folder in ASKED.items():
            if frames == "all" or (settings.shuffled and not trial.baseline):
                asked = settings.evaluation.model_dump() | {
                    "frames": "none" if trial.is_blind else frames,
                    "model": summary["checkpoint"],
                    "output": str(trial.folder / folder),
                }
                logger.info("%s\n%s", frames, machinery.evaluate(EvaluationSettings.model_validate(asked)))
        result = {
            "trial": trial.name,
            "variant": trial.variant,
            "seed": trial.seed,
            "point": dict(trial.point),
            "mlflow_run_id": run.mlflow.run_id if run.mlflow else None,
            **{key: summary[key] for key in _KEPT},
        }
        run.log(result, read_answers(trial, "all"), read_accuracy(trial))
        write_json(trial.folder / RESULT_FILE, result)


_KEPT = ("seconds", "steps", "samples", "tokens", "loss_last", "parameters", "trainable_parameters", "checkpoint")
"""Of a training's summary."""


def is_finished(trial: Trial) -> bool:
    """Whether a trial has a result; one that was stopped has none, even if it came to its end nevertheless."""
    return (trial.folder / RESULT_FILE).exists() and not is_stopped(trial)


def mark_stopped(trial: Trial, step: int) -> None:
    """Notes that a trial was stopped because it was behind, and ends its MLflow runs."""
    write_json(trial.folder / STOPPED_FILE, {"step": step})
    for stage in trial.stages.stages.values():
        if (record := read_record(checkpoints_of(stage))) and not (Path(stage.output) / SUMMARY_FILE).exists():
            end_run(record.mlflow, "KILLED")
    end_run(read_run(trial.folder), "KILLED")


def is_stopped(trial: Trial) -> bool:
    """Whether a trial was stopped because it was behind."""
    return (trial.folder / STOPPED_FILE).exists()


def read_result(trial: Trial) -> dict[str, Any]:
    """Returns what a finished trial came to."""
    result: dict[str, Any] = json.loads((trial.folder / RESULT_FILE).read_text(encoding="utf-8"))
    return result


def read_answers(trial: Trial, frames: str) -> list[dict[str, Any]]:
    """Returns every answer of a trial, with the frames `all` or `shuffled`; none when it was not asked so."""
    file = trial.folder / ASKED[frames] / ANSWERS_FILE
    answers: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    return answers


def read_accuracy(trial: Trial) -> dict[int, float]:
    """Returns step -> share of right answers while a trial was trained, the steps of all stages counted through."""
    points: dict[int, float] = {}
    done = 0
    for stage in trial.stages.stages.values():
        file = Path(stage.output) / METRICS_FILE
        if file.exists():
            points |= {done + step: share for step, share in read_curve(file, ACCURACY).items()}
            done += max(read_curve(file, "train/loss"), default=0)
    return points


def _tracked_below(stages: TwoStages, run: TrialRun) -> TwoStages:
    """The training, its stages' runs children of the trial's."""
    if run.mlflow is None:
        return stages
    below = {
        name: stage.model_copy(update={"tracking": stage.tracking.model_copy(update={"parent": run.mlflow.run_id})})
        for name in STAGES
        if (stage := getattr(stages, name))
    }
    return stages.model_copy(update=below)
