"""The `tiny` preset learns as it always did: a change of these numbers is a change of what Valley computes.

`VALLEY_WRITE_GOLDEN=1 pytest tests/unit/training/test_training_golden.py` writes them anew; say in the commit why.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from training_makers import write_data

from valley.config import load_settings
from valley.training.job import open_job, prepare_job
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.tracking import read_curve

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny_losses.json"
SMALL = ["train.max_steps=8", "train.global_batch=8", "data.validation.sources=[]", "data.validation.fraction=0"]
PLAIN = ["cluster.num_workers=0", "engine.name=torch", "tracking.enabled=false"]


def write_clips(folder: Path) -> Path:
    """Twenty dialogues about clips of one to four pictures."""
    path = write_data(folder, "pictures", 20)
    records = json.loads(path.read_text())
    pictures = [record["image"] for record in records if "image" in record]
    for index, record in enumerate(records):
        if "image" in record:
            record["image"] = [pictures[(index + frame) % len(pictures)] for frame in range(1 + index // 2 % 4)]
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The loss of each step of both stages, for each temporal module."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("golden")
    sources = [write_clips(folder), write_data(folder, "words", 8, pictures=False)]
    data = f"data.sources=[{', '.join(f'{{path: {path}}}' for path in sources)}]"
    found = {}
    for temporal in ("v1", "v2", "v3"):
        first, second = folder / f"{temporal}-1", folder / f"{temporal}-2"
        stages = {
            "tiny": [f"output={first}", f"model.temporal={temporal}"],
            "tiny-finetune": [f"output={second}", f"model.path={first / 'model'}"],
        }
        for preset, own in stages.items():
            settings = load_settings(RunSettings, preset, [data, *SMALL, *PLAIN, *own])
            train_rank(open_job(prepare_job(settings)), device=torch.device("cpu"))
            curve = read_curve(Path(settings.output) / "metrics.jsonl", "train/loss")
            found[f"{preset} {temporal}"] = [round(loss, 6) for loss in curve.values()]
    return found


def test_both_stages_of_the_tiny_preset_learn_as_they_always_did(losses: dict[str, list[float]]) -> None:
    if os.environ.get("VALLEY_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert losses.keys() == golden.keys()
    for name, curve in golden.items():
        assert losses[name] == pytest.approx(curve, abs=2e-3), name
