"""A new model's tower is standardised once, on the first training samples, and never again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_makers import EXACT, MODEL, STAGE, new_model, run_ranks, run_settings, write_data

from valley.checkpoints.source import read_trained
from valley.errors import SettingsError
from valley.training.engines import ENGINES
from valley.training.job import open_job, prepare_job
from valley.training.run import train_rank
from valley.training.settings import RunSettings
from valley.training.stage import prepare
from valley.training.standardise import NUM_SAMPLES, standardise
from valley.training.summary import read_summary

ASKED = {"model": MODEL.model_dump() | {"vision": MODEL.vision.model_dump() | {"standardise": True}}}


def settings_in(folder: Path, **changes: Any) -> RunSettings:
    """More samples than are looked at, every second one with a picture."""
    folder.mkdir(exist_ok=True)
    return run_settings(folder, [write_data(folder, "pictures", 2 * NUM_SAMPLES)], **(ASKED | changes))


def buffers_after(settings: RunSettings, engine: str = "torch") -> list[torch.Tensor]:
    """The mean and deviation that a rank's model has before its first step."""
    torch.set_num_threads(1)
    model = new_model()
    made = ENGINES[engine](model, prepare(model, STAGE), STAGE, EXACT, torch.device("cpu"))
    standardise(prepare_job(settings), made)
    return [model.standardisation.mean.clone(), model.standardisation.std.clone()]


def test_the_patches_of_the_first_samples_come_out_with_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    loader = prepare_job(settings).loader
    frames = [sample.frames for sample in map(loader.load, range(NUM_SAMPLES)) if len(sample.frames)]
    later = [sample.frames for sample in map(loader.load, range(NUM_SAMPLES, 90)) if len(sample.frames)]
    model = new_model()
    model.standardisation.mean, model.standardisation.std = buffers_after(settings)

    patches, others = (
        model.standardisation(torch.cat([model.encode_frames(torch.from_numpy(picture)) for picture in pictures]))[
            :, 1:
        ].flatten(0, 1)
        for pictures in (frames, later)
    )
    assert torch.allclose(patches.mean(0), torch.zeros(64), atol=1e-4)
    assert torch.allclose(patches.std(0, correction=0), torch.ones(64), atol=1e-4)
    assert not torch.allclose(others.mean(0), torch.zeros(64), atol=1e-2)


def test_any_number_of_ranks_has_the_same_numbers(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    alone = buffers_after(settings)
    (Path(settings.output) / "standardisation.json").unlink()
    both = run_ranks(2, buffers_after, settings, folder=tmp_path)
    for found in both:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, alone, strict=True))


def test_a_run_that_goes_on_takes_its_numbers_from_its_folder_and_a_new_one_measures_anew(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    file = Path(settings.output) / "standardisation.json"
    open_job(prepare_job(settings))
    measured = buffers_after(settings)
    file.write_text(json.dumps({"mean": [3.0] * 64, "std": [7.0] * 64}))
    assert [set(buffer.tolist()) for buffer in buffers_after(settings)] == [{3.0}, {7.0}]

    begun_anew = settings.checkpoint.model_copy(update={"resume": False})
    open_job(prepare_job(settings.model_copy(update={"checkpoint": begun_anew})))
    assert all(torch.equal(new, old) for new, old in zip(buffers_after(settings), measured, strict=True))


def test_a_saved_model_has_them_and_keeps_them(tmp_path: Path) -> None:
    first = settings_in(tmp_path / "first")
    first = first.model_copy(update={"train": first.train.model_copy(update={"max_steps": 1})})
    train_rank(open_job(prepare_job(first)), device=torch.device("cpu"))
    model = Path(first.output) / "model"
    saved = load_file(model / "model.safetensors")
    checkpoint = Path(read_summary(Path(first.output))["training_checkpoint"])
    exported = read_trained(checkpoint, None).weights
    assert all(torch.equal(exported[name], saved[name]) for name in ("standardisation.mean", "standardisation.std"))
    assert (saved["standardisation.std"] != 1).all()

    second = settings_in(tmp_path / "second", model=ASKED["model"] | {"path": str(model)})
    second = second.model_copy(update={"train": second.train.model_copy(update={"max_steps": 1})})
    train_rank(open_job(prepare_job(second)), device=torch.device("cpu"))
    again = load_file(Path(second.output) / "model" / "model.safetensors")
    assert all(torch.equal(again[name], saved[name]) for name in ("standardisation.mean", "standardisation.std"))
    assert not (Path(second.output) / "standardisation.json").exists()


def test_without_being_asked_for_it_is_the_identity(tmp_path: Path) -> None:
    mean, std = buffers_after(settings_in(tmp_path, model=MODEL.model_dump()))
    assert (set(mean.tolist()), set(std.tolist())) == ({0.0}, {1.0})


def test_data_without_pictures_are_refused(tmp_path: Path) -> None:
    settings = run_settings(tmp_path, [write_data(tmp_path, "words", 8, pictures=False)], **ASKED)
    with pytest.raises(SettingsError, match="none of the first 64 training samples has a picture"):
        buffers_after(settings)
