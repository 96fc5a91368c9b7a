"""What a new model's standardisation was set to, kept in the run folder: no parameter, so no checkpoint holds it."""

from __future__ import annotations

import json
from pathlib import Path

from valley.checkpoints.store import write_json
from valley.model.vision import Moments

STANDARDISATION_FILE = "standardisation.json"


def read_moments(run: Path) -> Moments | None:
    """Returns what the run in a folder measured; None when it measured nothing."""
    file = run / STANDARDISATION_FILE
    moments: Moments | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return moments


def write_moments(run: Path, moments: Moments) -> None:
    """Writes what was measured, whole or not at all."""
    write_json(run / STANDARDISATION_FILE, moments)
