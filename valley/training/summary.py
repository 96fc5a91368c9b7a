"""The last word of a run: `summary.json`, for people and for whatever looks at runs from outside."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from valley.checkpoints.places import Place
from valley.checkpoints.store import write_json
from valley.data.rejects import Reject
from valley.training.loop import FitResult
from valley.training.mlflow_tracker import MlflowRun, ui_command
from valley.training.stage import ModuleRow

SUMMARY_FILE = "summary.json"


def summarise(
    result: FitResult,
    *,
    parts: Sequence[ModuleRow],
    model: Path,
    checkpoint: Place | None,
    best_checkpoint: Place | None,
    rejects: Sequence[Reject],
    rejects_table: Path,
    mlflow: MlflowRun | None,
) -> dict[str, Any]:
    """Returns what a run amounted to, ready for JSON.

    Args:
        result: figures of the loop.
        parts: what the model consists of.
        model: the final model, a Hugging Face folder.
        checkpoint: what the run can be gone on with.
        best_checkpoint: the same of the lowest validation loss.
        rejects: what could not be used.
        rejects_table: where they are listed.
        mlflow: where the curves are.
    """
    totals = result.totals
    return {
        "loss_first": _finite(result.loss_first),
        "loss_last": _finite(result.loss_last),
        "validation_loss": _finite(result.validation_loss),
        "best_validation_loss": _finite(result.best_loss),
        "best_step": result.best_step,
        "steps": totals.num_steps,
        "samples": totals.num_samples,
        "tokens": totals.num_tokens,
        "frames": totals.num_frames,
        "seconds": round(totals.seconds, 3),
        "samples_per_s": round(totals.per_second(totals.later_samples), 3),
        "tokens_per_s": round(totals.per_second(totals.later_tokens), 1),
        "frames_per_s": round(totals.per_second(totals.later_frames), 3),
        "data_wait_share": round(totals.wait_share, 4),
        "padding_share": round(1 - totals.num_tokens / max(totals.num_places, 1), 4),
        "parameters": {part.module: part.num_parameters for part in parts},
        "trainable_parameters": sum(part.num_trainable for part in parts),
        "peak_memory_gib": round(totals.peak_memory_bytes / 2**30, 3),
        "rejected": len(rejects),
        "rejected_for": dict(Counter(reject.error for reject in rejects).most_common()),
        "rejects_table": str(rejects_table),
        "checkpoint": str(model),
        "training_checkpoint": str(checkpoint) if checkpoint else None,
        "best_checkpoint": str(best_checkpoint) if best_checkpoint else None,
        "mlflow_run_id": mlflow.run_id if mlflow else None,
        "mlflow_ui": ui_command(mlflow.uri) if mlflow else None,
    }


def write_summary(folder: Path, summary: dict[str, Any]) -> Path:
    """Writes `summary.json` into the run folder, whole or not at all."""
    path = folder / SUMMARY_FILE
    write_json(path, summary)
    return path


def format_summary(summary: dict[str, Any]) -> str:
    """Lays a summary out as text."""
    loss = f"{_number(summary['loss_first'])} at first, {_number(summary['loss_last'])} at last"
    if summary["validation_loss"] is not None:
        best = f"{_number(summary['best_validation_loss'])} at step {summary['best_step']}"
        loss += f"; validation {_number(summary['validation_loss'])}, best {best}"
    lines = {
        "loss": loss,
        "seen": f"{summary['steps']} steps, {summary['samples']} samples, {summary['frames']} frames",
        "speed": f"{summary['samples_per_s']:.1f} samples/s, {summary['frames_per_s']:.1f} frames/s, "
        f"{summary['data_wait_share']:.1%} of the time waiting for data",
        "rejected": _rejected(summary),
        "model": summary["checkpoint"],
        "MLflow": summary["mlflow_ui"] or "not tracked",
    }
    return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def _rejected(summary: dict[str, Any]) -> str:
    if not summary["rejected"]:
        return "0"
    reasons = ", ".join(f"{count} {error}" for error, count in summary["rejected_for"].items())
    return f"{summary['rejected']} ({reasons}): {summary['rejects_table']}"


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN; what is not finite is said in the curves."""
    return value if value is not None and math.isfinite(value) else None


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def read_summary(folder: Path) -> dict[str, Any]:
    """Returns a finished run's summary."""
    summary: dict[str, Any] = json.loads((folder / SUMMARY_FILE).read_text())
    return summary
