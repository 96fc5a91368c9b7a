"""The picture of a run: its loss, step by step, and the validation loss beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from valley.training.tracking import read_curve

_TRAIN, _VALIDATION, _GREY = "#2b6cb0", "#c05621", "#4a5568"


def draw_loss_curve(metrics: Path, picture: Path, title: str) -> None:
    """Draws the loss in a `metrics.jsonl` as a PNG: each step faint, their running mean strong, validation as dots."""
    train, validation = read_curve(metrics, "train/loss"), read_curve(metrics, "validation/loss")
    figure = Figure(figsize=(8, 4.5), dpi=144, layout="constrained")
    axes = figure.subplots()
    steps, losses = _arrays(train)
    axes.plot(steps, losses, color=_TRAIN, alpha=0.3, linewidth=1)
    axes.plot(steps, _running_mean(losses), color=_TRAIN, linewidth=2, label="training")
    if validation:
        axes.plot(*_arrays(validation), color=_VALIDATION, marker="o", markersize=4, linewidth=1.2, label="validation")
    axes.set_title(title, loc="left", fontsize=12, color=_GREY)
    axes.set_xlabel("step", color=_GREY)
    axes.set_ylabel("loss a supervised token", color=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#cbd5e0")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, labelcolor=_GREY)
    figure.savefig(picture)


def _arrays(curve: Mapping[int, float]) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    return np.array(list(curve), dtype=np.float64), np.array(list(curve.values()), dtype=np.float64)


def _running_mean(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Exponential mean over about a thirtieth of the curve, unbiased at its beginning; NaNs are passed over."""
    keep = 1 - 1 / max(len(values) / 30, 1)
    mean = np.full(len(values), np.nan)
    total = weight = 0.0
    for index, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        mean[index] = total / weight if weight else np.nan
    return mean
