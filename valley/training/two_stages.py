"""Both training stages in one go (paper 4.3): what the first has made, the second begins with."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from valley.config import PRESETS, Location, Settings
from valley.model.saved import MODEL_FOLDER
from valley.training.job import ANSWERS_FILE, is_finished
from valley.training.mlflow_tracker import tracking_uri
from valley.training.settings import RunSettings
from valley.training.summary import SUMMARY_FILE, read_summary, write_summary

logger = logging.getLogger(__name__)

_SHOWN_ANSWERS = 3


class TwoStages(Settings):
    """A whole training."""

    presets: ClassVar[Path] = PRESETS / "two-stages"

    output: Location = "runs/train"
    """Run folder; the stages have theirs in it, `pretrain` and `finetune`."""
    pretrain: RunSettings
    """Stage 1; its `output` is set by the one above."""
    finetune: RunSettings
    """Stage 2; its `output` likewise, its `model.path` by stage 1."""

    @model_validator(mode="after")
    def _stages_lie_apart(self) -> TwoStages:
        path = self.pretrain.checkpoint.path
        if path and path == self.finetune.checkpoint.path:
            raise ValueError(f"pretrain.checkpoint.path and finetune.checkpoint.path are one, {path}: name two")
        return self

    @property
    def first(self) -> RunSettings:
        """Stage 1 in its place."""
        return self._in_place(self.pretrain, "pretrain")

    @property
    def second(self) -> RunSettings:
        """Stage 2 in its place, from the model of stage 1."""
        path = str(Path(self.first.output) / MODEL_FOLDER)
        model = self.finetune.model.model_copy(update={"path": path})
        return self._in_place(self.finetune, "finetune").model_copy(update={"model": model})

    @property
    def planned_finetune(self) -> RunSettings:
        """Stage 2 of the model that stage 1 is going to begin with: what can be planned before there is one."""
        return self.second.model_copy(update={"model": self.pretrain.model})

    def _in_place(self, stage: RunSettings, name: str) -> RunSettings:
        """A stage in its folder, tracked beside the folder of both."""
        whole = stage.model_copy(update={"output": self.output})
        tracking = {
            "uri": tracking_uri(whole),
            "run_name": stage.tracking.run_name or f"{Path(self.output).name} {name}",
        }
        return stage.model_copy(
            update={
                "output": str(Path(self.output) / name),
                "tracking": stage.tracking.model_copy(update=tracking),
            }
        )


def run_two_stages(settings: TwoStages, train: Callable[[RunSettings], str]) -> str:
    """Runs both stages; the same command goes on where an earlier one was interrupted.

    Args:
        settings: of both.
        train: runs one of them and returns its summary as text.

    Returns:
        The summary as text, with answers to questions about held-out clips.

    Raises:
        ValleyError: settings, data, model, storage or cluster cannot be used.
    """
    folder = Path(settings.output)
    first, second = settings.first, settings.second
    if (folder / SUMMARY_FILE).exists():  # a finished training is done anew
        (folder / SUMMARY_FILE).unlink()
        first, second = (_anew(stage) for stage in (first, second))
    if first.checkpoint.resume and is_finished(first):
        logger.info("stage 1 is done: %s", first.output)
    else:
        logger.info("stage 1\n%s", train(first))
    text = train(second)
    write_summary(folder, _together(read_summary(Path(first.output)), read_summary(Path(second.output))))
    return f"{text}\n\n{_answers(Path(second.output) / ANSWERS_FILE)}".strip()


def _anew(stage: RunSettings) -> RunSettings:
    return stage.model_copy(update={"checkpoint": stage.checkpoint.model_copy(update={"resume": False})})


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The last stage's figures, with sums over both where there are any to make, and each stage's own below."""
    sums = ("steps", "samples", "tokens", "frames", "seconds", "rejected")
    return {
        **second,
        **{key: first[key] + second[key] for key in sums},
        "stages": {"pretrain": first, "finetune": second},
    }


def _answers(path: Path) -> str:
    """The last answers to held-out questions, right or wrong, beside the truth."""
    if not path.exists():
        return ""
    table = json.loads(path.read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    last = [row for row in rows if row["step"] == rows[-1]["step"]][:_SHOWN_ANSWERS]
    return "\n".join(
        f"asked     {row['question']}\nanswered  {row['answer'] or '(nothing)'}\ntruth     {row['truth']}"
        for row in last
    )
