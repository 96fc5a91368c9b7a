"""Two stages are one training: the second begins with what the first made, and neither is done twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from training_makers import run_settings, write_data

from valley.model.settings import LoRASettings
from valley.training.job import job_status, open_job, prepare_job
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.summary import read_summary
from valley.training.two_stages import TwoStages, run_two_stages


class Trainer:
    """Trains in this process and remembers what; fails on a stage when told to."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.fails_on = ""

    def __call__(self, settings: RunSettings) -> str:
        name = Path(settings.output).name
        if name == self.fails_on:
            raise KeyboardInterrupt
        job = open_job(prepare_job(settings))
        with job_status(job):
            train_rank(job, device=torch.device("cpu"))
        self.trained.append(name)
        return f"summary of {name}"


@pytest.fixture
def settings(tmp_path: Path) -> TwoStages:
    stage = run_settings(tmp_path, [write_data(tmp_path, "pictures", 12)])
    train = stage.train.model_copy(update={"modules": ["temporal", "projector", "llm"], "learning_rate": 1e-3})
    second = stage.model_copy(update={"train": train, "lora": LoRASettings(rank=2)})
    return TwoStages(output=str(tmp_path / "both"), pretrain=stage, finetune=second)


def tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


def test_the_second_stage_tunes_what_the_first_made_and_both_are_summed_up(settings: TwoStages) -> None:
    text = run_two_stages(settings, Trainer())

    folder = Path(settings.output)
    summary = json.loads((folder / "summary.json").read_text())
    stages = [read_summary(folder / name) for name in ("pretrain", "finetune")]
    assert list(summary["stages"].values()) == stages
    assert summary["samples"] == sum(stage["samples"] for stage in stages)
    assert summary["checkpoint"] == str(folder / "finetune" / "model")
    assert (summary["loss_first"], summary["loss_last"]) == (stages[1]["loss_first"], stages[1]["loss_last"])
    first, second = (tensors(folder / name / "model", "language_model.") for name in ("pretrain", "finetune"))
    assert first.keys() == second.keys()
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert all("_proj" in name for name in changed)  # the update is merged into the linear layers, and only there
    assert (folder / "finetune" / "adapter" / "adapter_model.safetensors").is_file()
    assert text.startswith(f"loss      {stages[1]['loss_first']:.4f} at first")
    assert text.count("asked     Which grey is number") + text.count("asked     What is") == text.count(
        "truth     number"
    )
    assert 1 <= text.count("answered") <= 3


def test_a_stage_that_is_done_is_not_done_again_until_all_is(settings: TwoStages) -> None:
    trainer = Trainer()
    trainer.fails_on = "finetune"
    with pytest.raises(KeyboardInterrupt):
        run_two_stages(settings, trainer)
    trainer.fails_on = ""
    run_two_stages(settings, trainer)
    assert trainer.trained == ["pretrain", "finetune"]

    run_two_stages(settings, trainer)
    assert trainer.trained == ["pretrain", "finetune"] * 2


def test_a_first_stage_of_other_settings_is_done_anew(settings: TwoStages) -> None:
    trainer = Trainer()
    run_two_stages(settings, trainer)
    (Path(settings.output) / "summary.json").unlink()
    faster = settings.pretrain.train.model_copy(update={"learning_rate": 0.02})
    changed = settings.model_copy(update={"pretrain": settings.pretrain.model_copy(update={"train": faster})})
    run_two_stages(changed, trainer)
    assert trainer.trained == ["pretrain", "finetune"] * 2
