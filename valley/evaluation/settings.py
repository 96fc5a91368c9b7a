"""Which model is asked which questions."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from valley.config import Location, Settings
from valley.media.limits import Limits


class QuestionSettings(Settings):
    """Which questions are asked, and how."""

    questions: Location
    """Records (appendix B) that also have a `kind`, the true `answer` and all its `choices`."""
    root: Location = ""
    """Folder or fsspec URI that media paths are relative to; empty: the questions' own folder."""
    batch: PositiveInt = 16
    """Questions asked at once."""
    max_new_tokens: PositiveInt = 16
    """Longest answer."""
    max_questions: PositiveInt | None = None
    """Ask only this many, the first ones; null: all."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto`: on the GPU when there is one."""
    frames: Literal["all", "shuffled", "none"] = "all"
    """What is shown with a question: the frames in order, in a random order, or none. What needs time cannot be
    answered from shuffled frames, and nothing but the text's own bias from none."""
    limits: Limits = Limits()


class EvaluationSettings(QuestionSettings):
    """One evaluation."""

    model: Location
    """A saved Valley model: a training run's `model` folder."""
    output: Location = "runs/evaluation"
    """Folder of `summary.json` and `answers.json`."""
