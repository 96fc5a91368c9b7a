"""The sample data: generated scenes, and four real clips where their package is installed, in one folder."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from valley.config import PRESETS, Location, Settings
from valley.data.clips import make_clips
from valley.data.scenes import DESIGNS, KINDS, PATTERNS, make_scenes
from valley.data.writing import write_text
from valley.errors import MissingMediaError

logger = logging.getLogger(__name__)


class SamplesSettings(Settings):
    """What to make, and where."""

    presets: ClassVar[Path] = PRESETS / "samples"

    output: Location = "samples"
    """Folder to fill; `summary.json` tells what is in it."""
    clips: NonNegativeInt = 160
    """Generated clips to train on."""
    heldout: NonNegativeInt = 40
    """Generated clips to ask questions about."""
    seed: NonNegativeInt = 0
    """Same seed, same data."""
    kinds: list[str] = list(KINDS)
    """Kinds of question; only scenes that carry one of them are made."""
    designs: list[str] = list(DESIGNS)
    """Designs of scenes: `still` and so on."""
    patterns: list[str] = list(PATTERNS)
    """Patterns of the grounds; `smooth` ones are the easiest to tell an object from."""
    longest_s: Annotated[int, Field(ge=4)] = 24
    """Seconds that no generated clip exceeds; short ones are made, and decoded, sooner."""
    workers: PositiveInt = Field(default_factory=lambda: os.cpu_count() or 1)
    """Processes that paint and encode; one for each core unless given."""
    real: bool = True
    """Whether to add the real clips."""


def make_samples(settings: SamplesSettings) -> dict[str, Any]:
    """Makes what is missing and returns what is there, which is also written to `summary.json` in the folder.

    Raises:
        SettingsError: a name is not known, or the folder holds clips that are not ours.
    """
    output = Path(settings.output)
    started_s = time.perf_counter()
    scenes = make_scenes(
        output / "scenes",
        num_train=settings.clips,
        num_heldout=settings.heldout,
        seed=settings.seed,
        workers=settings.workers,
        kinds=settings.kinds,
        designs=settings.designs,
        patterns=settings.patterns,
        longest_s=settings.longest_s,
    )
    questions = json.loads(scenes.heldout_questions.read_text(encoding="utf-8"))
    summary = {
        "clips": scenes.num_clips,
        "clips_made_now": scenes.num_made,
        "real_clips": _make_real(output / "clips") if settings.real else 0,
        "questions": dict(Counter(question["kind"] for question in questions)),
        "seconds": round(time.perf_counter() - started_s, 3),
    }
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _make_real(folder: Path) -> int:
    try:
        return make_clips(folder).num_clips
    except MissingMediaError as error:
        logger.warning("no real clips: %s", error.reason)
        return 0
