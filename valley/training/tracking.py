"""Where the numbers of a run go: a file beside the checkpoints always, MLflow besides (`mlflow_tracker.py`)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from valley.config import Settings

METRICS_FILE = "metrics.jsonl"


@runtime_checkable
class Tracker(Protocol):
    """Takes the numbers and files of one run; no call may stall or stop the training."""

    def log_params(self, params: Mapping[str, str]) -> None:
        """Notes what the run was asked to do."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a point at `step` to every curve named."""

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Keeps a file or folder with the run, below `folder`."""

    def close(self) -> None:
        """Writes out what is still waiting."""


class FileTracker:
    """One JSON line a point in `metrics.jsonl`: `{"step": 3, "time": …, "train/loss": …}`.

    NaN and infinities are written as Python's `json` writes and reads them. Points of an earlier run are dropped; of a
    run that goes on, those after the step that it goes on from.

    Args:
        path: the file.
        first_step: steps taken before; 0: a new run.
    """

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept_from = first_step and path.exists()
        kept = [json.dumps(point) + "\n" for point in _lines(path) if point["step"] <= first_step] if kept_from else []
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self._file = path.open("a")

    def log_params(self, params: Mapping[str, str]) -> None:
        """Nothing: the settings lie in the run folder."""

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line and hands it to the operating system."""
        line = {"step": step, "time": round(time.time(), 3), **metrics}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """Nothing: artifacts lie in the run folder."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Trackers:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def log_params(self, params: Mapping[str, str]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log_params(params)

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log_metrics(step, metrics)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.log_artifact(path, folder)

    def close(self) -> None:
        """See `Tracker`."""
        for tracker in self._trackers:
            tracker.close()


def read_curve(path: Path, name: str) -> dict[int, float]:
    """Returns step -> value of one curve of a `metrics.jsonl`; of a step taken twice, the later value."""
    curve = {line["step"]: line[name] for line in _lines(path) if name in line}
    return dict(sorted(curve.items()))


def metric_name(text: str) -> str:
    """Returns `text` with whatever MLflow does not allow in a name replaced by `_`."""
    return re.sub(r"[^\w.\- /]", "_", text)


def flatten(settings: Settings) -> dict[str, str]:
    """Returns dotted path -> value of every setting, as text."""
    return dict(_leaves(settings.model_dump(mode="json"), ""))


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for index, item in enumerate(tree):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, json.dumps(tree) if isinstance(tree, list | dict | bool) or tree is None else str(tree)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue  # the last line of a run that was killed while writing it
