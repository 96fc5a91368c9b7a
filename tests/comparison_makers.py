"""Comparisons whose trials were never run: only their results are there, as a real one leaves them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from valley.checkpoints.store import write_json
from valley.comparison.settings import CompareSettings
from valley.comparison.trial import ASKED, RESULT_FILE
from valley.comparison.trials import Trial
from valley.config import validate

KINDS = {"colour": (8, True), "direction": (4, False)}
"""Choices, and whether one frame suffices."""


def compare_settings(folder: Path, **changes: Any) -> CompareSettings:
    """Settings whose data are not there."""
    stage = {
        "model": {"vision": {"name": "tiny", "pretrained": None}, "llm": {"name": "tiny"}},
        "data": {"sources": [{"path": str(folder / "data.json")}]},
    }
    tree = {
        "output": str(folder / "runs" / "compared"),
        "finetune": stage,
        "evaluation": {"questions": str(folder / "questions.json")},
        "seeds": [0, 1],
        **changes,
    }
    return validate(CompareSettings, tree)


def write_trial(trial: Trial, right: Callable[[str], Sequence[bool]], *, shuffled: float | None = None) -> None:
    """Writes what a finished trial leaves: `right` says for each kind which of its questions were answered rightly."""
    trial.folder.mkdir(parents=True)
    rows = [
        {
            "id": f"{kind}-{number}",
            "kind": kind,
            "pair": f"{kind}-{number // 2}",
            "single_frame": KINDS[kind][1],
            "duration_s": 4.0 + number % 3 * 6,
            "choices": ["x"] * KINDS[kind][0],
            "right": bool(answer),
        }
        for kind in KINDS
        for number, answer in enumerate(right(kind))
    ]
    write(trial.folder / ASKED["all"] / "answers.json", rows)
    if shuffled is not None:
        rng = np.random.default_rng(0)
        write(
            trial.folder / ASKED["shuffled"] / "answers.json",
            [{**row, "right": bool(rng.random() < shuffled)} for row in rows],
        )
    result = {
        "trial": trial.name,
        "variant": trial.variant,
        "seed": trial.seed,
        "point": dict(trial.point),
        "mlflow_run_id": None,
        "seconds": 60.0 + 30 * trial.seed,
        "steps": 100,
        "samples": 1600,
        "tokens": 1,
        "loss_last": 0.1,
        "parameters": {"temporal": 1234, "llm": 5},
        "trainable_parameters": 56789,
        "checkpoint": str(trial.folder / "finetune" / "model"),
    }
    curve = trial.folder / "finetune" / "metrics.jsonl"
    curve.parent.mkdir()
    curve.write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 50, "validation/accuracy": 0.3}\n'
        '{"step": 100, "train/loss": 1.0, "validation/accuracy": 0.5}\n'
    )
    write(trial.folder / RESULT_FILE, result)


def write(path: Path, content: Any) -> None:
    """Writes JSON into a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
