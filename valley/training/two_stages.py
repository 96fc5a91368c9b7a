"""Both training stages in one go (paper 4.3): what the first has made, the second begins with.

A language model that is trained from nothing has no use for a first stage, which would leave it as it is: that may be
left out.
"""

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
from valley.training.summary import SUMMARY_FILE, format_summary, read_summary, write_summary

logger = logging.getLogger(__name__)

_SHOWN_ANSWERS = 3


class TwoStages(Settings):
    """A whole training."""

    presets: ClassVar[Path] = PRESETS / "two-stages"

    output: Location = "runs/train"
    """Run folder; the stages have theirs in it, `pretrain` and `finetune`."""
    pretrain: RunSettings | None = None
    """Stage 1; its `output` is set by the one above. Null: there is none."""
    finetune: RunSettings
    """Stage 2; its `output` likewise, its `model.path` by stage 1."""

    @model_validator(mode="after")
    def _stages_lie_apart(self) -> TwoStages:
        path = self.pretrain.checkpoint.path if self.pretrain else ""
        if path and path == self.finetune.checkpoint.path:
            raise ValueError(f"pretrain.checkpoint.path and finetune.checkpoint.path are one, {path}: name two")
        return self

    @property
    def stages(self) -> dict[str, RunSettings]:
        """The stages in their places, by name, in order; the second begins with the model of the first."""
        second = self._in_place(self.finetune, "finetune")
        if not self.pretrain:
            return {"finetune": second}
        first = self._in_place(self.pretrain, "pretrain")
        model = second.model.model_copy(update={"path": str(Path(first.output) / MODEL_FOLDER)})
        return {"pretrain": first, "finetune": second.model_copy(update={"model": model})}

    @property
    def planned(self) -> dict[str, RunSettings]:
        """The same before there is a model: the second with one like that which the first begins with."""
        first = next(iter(self.stages.values()))
        return {name: stage.model_copy(update={"model": first.model}) for name, stage in self.stages.items()}

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
    folder, stages = Path(settings.output), settings.stages
    if (folder / SUMMARY_FILE).exists():  # a finished training is done anew
        (folder / SUMMARY_FILE).unlink()
        stages = {name: _anew(stage) for name, stage in stages.items()}
    for name, stage in stages.items():
        if stage.checkpoint.resume and is_finished(stage):
            logger.info("%s is done: %s", name, stage.output)
        else:
            logger.info("%s\n%s", name, train(stage))
    summaries = {name: read_summary(Path(stage.output)) for name, stage in stages.items()}
    write_summary(folder, _together(summaries))
    last = Path(stages["finetune"].output)
    return f"{format_summary(summaries['finetune'])}\n\n{_answers(last / ANSWERS_FILE)}".strip()


def _anew(stage: RunSettings) -> RunSettings:
    return stage.model_copy(update={"checkpoint": stage.checkpoint.model_copy(update={"resume": False})})


def _together(stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The last stage's figures, with sums over all where there are any to make, and each stage's own below."""
    sums = ("steps", "samples", "tokens", "frames", "seconds", "rejected")
    return {
        **stages["finetune"],
        **{key: sum(stage[key] for stage in stages.values()) for key in sums},
        "stages": stages,
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
