"""Training on a store of features is training on the files themselves; filling it goes on where it was left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_makers import run_settings, write_data

from valley.errors import SettingsError
from valley.features.store import FeatureStore
from valley.model.build import build_model, build_tower
from valley.model.settings import ModelSettings
from valley.training.encoding import EncodeSettings, encode_plain, plan_encoding
from valley.training.run import run_plain
from valley.training.settings import RunSettings
from valley.training.tracking import read_curve


def settings_of(folder: Path, **changes: object) -> RunSettings:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "words.json").exists():
        write_data(folder, "pictures", 12)
        write_data(folder, "words", 6, pictures=False)
    cluster = {"cluster": {"num_workers": 0}}
    return run_settings(folder, [folder / "pictures.json", folder / "words.json"], **cluster, **changes)


def encoding(settings: RunSettings, **changes: object) -> EncodeSettings:
    return EncodeSettings.model_validate(settings.model_dump(exclude={"features"}) | changes)


def losses(settings: RunSettings) -> list[float]:
    run_plain(settings)
    return list(read_curve(Path(settings.output) / "metrics.jsonl", "train/loss").values())


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_run_on_a_store_has_the_losses_of_a_run_on_the_files(tmp_path: Path, precision: str) -> None:
    store = str(tmp_path / "store")
    plain = settings_of(tmp_path / "data")
    encode_plain(encoding(plain, features=store, store={"precision": precision}))
    expected = losses(plain)
    found = losses(plain.model_copy(update={"output": str(tmp_path / "stored"), "features": store}))
    assert len(found) == len(expected) > 3
    assert found == pytest.approx(expected, abs=2e-3)
    answers = [
        json.loads((folder / "answers.json").read_text())["data"]
        for folder in (tmp_path / "stored", tmp_path / "data" / "run")
    ]
    assert len(answers[0]) == len(answers[1]) > 0


def test_pictures_do_matter_to_those_losses(tmp_path: Path) -> None:
    """The comparison above could not fail if the model did not look at its pictures."""
    plain = settings_of(tmp_path / "data")
    expected = losses(plain)
    for path in (tmp_path / "data").glob("*.png"):
        path.write_bytes((tmp_path / "data" / "pictures-0.png").read_bytes())
    changed = losses(plain.model_copy(update={"output": str(tmp_path / "changed")}))
    assert changed != pytest.approx(expected, abs=2e-3)


def test_filling_a_store_again_encodes_what_is_new_and_names_what_is_bad(tmp_path: Path) -> None:
    plain = settings_of(tmp_path / "data")
    job = encoding(plain, features=str(tmp_path / "store"), store={"clips_per_shard": 2})
    encode_plain(job)
    first = json.loads((tmp_path / "store" / "summary.json").read_text())
    assert (first["files"], first["encoded_now"], first["clips"], first["rejected"]) == (6, 6, 6, 0)
    assert first["bytes"] == first["bytes_estimated"] > 0
    (tmp_path / "data" / "pictures-0.png").write_bytes(b"no picture")
    shard = next((tmp_path / "store").glob("*.tokens"))
    shard.with_suffix(".parquet").unlink()  # a crash before the index of two files was written
    encode_plain(job)
    second = json.loads((tmp_path / "store" / "summary.json").read_text())
    assert second["rejected"] == 1
    assert second["encoded_now"] in (1, 2)  # the changed file may have been one of the two
    assert len(FeatureStore(tmp_path / "store")) == 4 + second["encoded_now"]


def test_a_run_refuses_the_store_of_another_tower(tmp_path: Path) -> None:
    plain = settings_of(tmp_path / "data")
    vision = plain.model.vision.model_copy(update={"seed": 5})
    other = plain.model.model_copy(update={"vision": vision})
    encode_plain(encoding(plain, features=str(tmp_path / "store"), model=other.model_dump()))
    with pytest.raises(SettingsError, match="weights"):
        run_plain(plain.model_copy(update={"features": str(tmp_path / "store")}))


def test_the_plan_tells_files_and_bytes_and_makes_no_store(tmp_path: Path) -> None:
    plain = settings_of(tmp_path / "data")
    plan = plan_encoding(encoding(plain, features=str(tmp_path / "store")))
    assert (plan.num_files, plan.num_frames) == (6, 6)
    assert "6 files, about 6 frames" in str(plan)
    assert not (tmp_path / "store").exists()


def test_models_that_differ_in_their_temporal_module_alone_start_alike_and_share_a_store() -> None:
    models = {}
    for temporal in ("v1", "v2", "v3"):
        settings = ModelSettings.model_validate(
            {"vision": {"name": "tiny", "pretrained": None}, "llm": {"name": "tiny"}, "temporal": temporal}
        )
        models[temporal] = build_model(settings, seed=3).state_dict()
        tower = build_tower(settings).state_dict()
        assert all(torch.equal(value, models[temporal][f"vision_tower.{name}"]) for name, value in tower.items())
    for name, value in models["v1"].items():
        assert torch.equal(value, models["v2"][name]), name
        assert torch.equal(value, models["v3"][name]), name


def test_the_tower_of_a_saved_model_is_read_without_the_rest(tmp_path: Path) -> None:
    settings = ModelSettings.model_validate({"vision": {"name": "tiny", "pretrained": None}, "llm": {"name": "tiny"}})
    model = build_model(settings, seed=3)
    model.save_pretrained(tmp_path)
    found = build_tower(ModelSettings(path=str(tmp_path))).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in model.vision_tower.state_dict().items())
