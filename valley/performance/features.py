"""Epochs from videos against epochs from a feature store: the same run twice, in turns, in one plain process."""

from __future__ import annotations

import json
import shutil
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from valley.config import load_settings
from valley.performance.report import table, versions
from valley.training.encoding import EncodeSettings, encode_plain
from valley.training.run import run_plain
from valley.training.settings import RunSettings
from valley.training.summary import SUMMARY_FILE
from valley.training.tracking import METRICS_FILE

PRESET, EPOCHS, REPEATS = "tiny", 4, 3


def run_features_benchmark(output: Path) -> str:
    """Measures epochs after the first and returns a Markdown section; raw figures go to `features.json` in `output`.

    The files are in the page cache both times. Logging, checkpoints and validation are off: what is left of an epoch is
    reading (and decoding) samples, the tower where it runs, and the rest of the model.
    """
    folder = output.absolute() / "features"
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        "cluster.num_workers=0", "engine.name=torch", "tracking.enabled=false", "data.validation.fraction=0",
        "checkpoint.every_steps=0", f"train.epochs={EPOCHS}",
    ]  # fmt: skip
    store = folder / "store"
    encode = load_settings(EncodeSettings, PRESET, [*words, f"output={folder / 'encode'}", f"features={store}"])
    encode_plain(encode)
    encoded: dict[str, Any] = json.loads((store / SUMMARY_FILE).read_text(encoding="utf-8"))
    seconds: dict[str, list[float]] = {"videos": [], "store": []}
    losses: dict[str, list[float]] = {}
    for repeat in range(REPEATS):
        for name, features in (("videos", ""), ("store", str(store))):
            run = folder / f"{name}-{repeat}"
            run_plain(load_settings(RunSettings, PRESET, [*words, f"output={run}", f"features={features}"]))
            points = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
            steps = [point for point in points if "train/loss" in point]
            length = len(steps) // EPOCHS
            seconds[name] += [end["time"] - begin["time"] for begin, end in pairwise(steps[length - 1 :: length])]
            losses[name] = [step["train/loss"] for step in steps]
    apart = max(abs(one - other) for one, other in zip(losses["videos"], losses["store"], strict=True))
    figures = {"seconds": seconds, "encoded": encoded, "largest_difference_of_losses": apart}
    (output / "features.json").write_text(json.dumps(figures, indent=1))
    return _report(seconds, encoded, apart, len(losses["store"]))


def _report(seconds: dict[str, list[float]], encoded: dict[str, Any], apart: float, num_steps: int) -> str:
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        [name, f"{middle[key]:.2f}", f"{middle['videos'] / middle[key]:.2f}"]
        for key, name in (("videos", "videos: decode and tower in every epoch"), ("store", "a feature store"))
    ]
    return "\n\n".join(
        [
            f"{versions('torch', 'av', 'decord')}. Preset `{PRESET}`, stage 1, on the sample clips, one plain process. "
            f"Median of {len(seconds['store'])} epochs after the first, in turns.",
            table(["epochs from", "s an epoch", "speed"], rows),
            f"The store holds {encoded['clips']} files, {encoded['frames_now']} frames in "
            f"{encoded['bytes'] / 2**20:.1f} MiB, and took {encoded['seconds']:.1f} s to fill. Losses of the two runs, "
            f"same seed, {num_steps} steps: {apart:.1e} apart at most.",
        ]
    )
