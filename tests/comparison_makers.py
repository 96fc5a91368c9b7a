"""Comparisons whose trials were never run: only their results are there, as a real one leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

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


COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


def write_colours(folder: Path, num_train: int, num_questions: int) -> tuple[Path, Path]:
    """Writes pictures of one colour with a question about it; returns the records to train on, and the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, files = np.random.default_rng(0), []
    for name, number in (("train", num_train), ("questions", num_questions)):
        records = []
        for index in range(number):
            colour = list(COLOURS)[index % len(COLOURS)]
            pixels = np.clip(np.array(COLOURS[colour]) + rng.integers(-20, 21, (48, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}-{index}.png")
            turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": f"It is {colour}."}]
            if index % 5 == 0:  # the question that counts is the last one
                before = [
                    {"from": "human", "value": "<image>\nWhat is it?"},
                    {"from": "gpt", "value": "It is a picture."},
                ]
                turns = [*before, {"from": "human", "value": "Which colour?"}, turns[1]]
            about = {"kind": "warm" if colour == "red" else "cold", "answer": colour, "choices": list(COLOURS)}
            records.append(
                {
                    "id": f"{name}-{index}",
                    "image": f"{name}-{index}.png",
                    "conversations": turns,
                    "duration_s": 2,
                    **about,
                }
            )
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(records))
    return files[0], files[1]


def colour_stage(folder: Path, **changes: Any) -> dict[str, Any]:
    """A stage of the tiny model, in one plain process, that learns the colours within seconds."""
    train, questions = write_colours(folder / "data", 64, 16)
    return {
        "model": {"vision": {"name": "tiny", "pretrained": None, "standardise": True}, "llm": {"name": "tiny"}},
        "data": {
            "sources": [{"path": str(train)}],
            "validation": {"sources": [{"path": str(questions)}], "every_steps": 8, "prompts": 0, "questions": 16},
        },
        "train": {
            "modules": ["temporal", "projector", "llm"],
            "epochs": 4,
            "global_batch": 8,
            "micro_batch": 8,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "gradient_checkpointing": False,
        },
        "engine": {"name": "torch"},
        "cluster": {"num_workers": 0, "gpu": False},
        **changes,
    }
