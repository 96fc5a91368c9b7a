"""Towers by open_clip's names: what their configuration says, their weights, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from valley.errors import ModelError
from valley.model.configuration import ValleyVisionConfig
from valley.model.settings import VisionSettings
from valley.model.vision import VisionTower, load_pretrained, vision_config

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "patch_size": 14, "width": 32, "head_width": 8, "layers": 3},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model that open_clip knows by name, and a file of its weights."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = folder / "ViT-test-14.json"
    config.write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(config)
    torch.manual_seed(3)
    weights = folder / "weights.pt"
    torch.save(open_clip.create_model("ViT-test-14").state_dict(), weights)
    return "ViT-test-14", weights


def described(name: str, pretrained: str | None, **changes: Any) -> ValleyVisionConfig:
    return vision_config(VisionSettings(name=name, pretrained=pretrained, **changes))


def test_the_papers_tower_is_vit_l_14_with_openais_preprocessing() -> None:
    config = vision_config(VisionSettings())
    assert (config.name, config.pretrained, config.layer) == ("ViT-L-14-quickgelu", "openai", -2)
    assert (config.size_px, config.num_patches, config.hidden_size) == (224, 256, 1024)
    assert config.mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert config.std == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    assert (config.interpolation, config.resize_mode) == ("bicubic", "shortest")
    assert config.tower["quick_gelu"] is True


@pytest.mark.parametrize(
    ("name", "tag", "size_px", "num_patches", "width", "mean", "resize_mode"),
    [
        ("ViT-L-14", "laion2b_s32b_b82k", 224, 256, 1024, 0.5, "shortest"),
        ("ViT-B-16-SigLIP-256", "webli", 256, 256, 768, 0.5, "squash"),
        ("EVA02-L-14-336", "merged2b_s6b_b61k", 336, 576, 1024, 0.48145466, "shortest"),
        ("ViT-B-32-quickgelu", "openai", 224, 49, 768, 0.48145466, "shortest"),
    ],
)
def test_size_and_normalisation_are_those_of_the_tag(
    name: str, tag: str, size_px: int, num_patches: int, width: int, mean: float, resize_mode: str
) -> None:
    config = described(name, tag)
    assert (config.size_px, config.num_patches, config.hidden_size) == (size_px, num_patches, width)
    assert config.mean[0] == pytest.approx(mean)
    assert config.resize_mode == resize_mode


@pytest.mark.parametrize(
    ("name", "pretrained", "changes", "reason"),
    [
        ("vit-l-14", None, {}, "close to it: .*ViT-L-14"),
        ("ViT-L-14", "opanai", {}, "neither a file nor a tag .* tags: openai, "),
        ("ViT-L-14", "openai", {}, "name ViT-L-14-quickgelu instead"),
        ("RN50", None, {}, "RN50 is not a ViT"),
        ("convnext_base", None, {}, "convnext_base is not a ViT"),
        ("tiny", None, {"layer": -4}, "tiny has 3 blocks, there is no -4"),
        ("tiny", None, {"layer": 3}, "tiny has 3 blocks, there is no 3"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    name: str, pretrained: str | None, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        described(name, pretrained, **changes)


def test_weights_come_from_a_file_and_are_those_of_its_visual_half(tiny_clip: tuple[str, Path]) -> None:
    name, weights = tiny_clip
    config = described(name, str(weights))
    tower = VisionTower(config)
    load_pretrained(tower, config)
    expected = {key.removeprefix("visual."): value for key, value in torch.load(weights).items() if "visual" in key}
    found = tower.visual.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_file_that_does_not_fit_is_refused(tiny_clip: tuple[str, Path], tmp_path: Path) -> None:
    weights = tmp_path / "other.pt"
    torch.save({"visual.proj": torch.zeros(3, 3)}, weights)
    config = described(tiny_clip[0], str(weights))
    with pytest.raises(ModelError, match=f"{weights} does not fit ViT-test-14"):
        load_pretrained(VisionTower(config), config)


def test_a_tower_without_weights_says_so_once(caplog: pytest.LogCaptureFixture, tiny_clip: tuple[str, Path]) -> None:
    config = described(tiny_clip[0], None)
    with caplog.at_level(logging.WARNING):
        load_pretrained(VisionTower(config), config)
    assert [record.message for record in caplog.records] == [
        "THE VISION TOWER ViT-test-14 IS RANDOM: no pretrained weights are asked for."
    ]


def test_weights_that_cannot_be_had_leave_the_tower_random_and_say_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(**request: Any) -> None:
        raise OSError(f"{request['repo_id']} is out of reach")

    monkeypatch.setattr("open_clip.pretrained.hf_hub_download", no_network)
    tower = VisionTower(described("tiny", None))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    config = described("ViT-B-32-quickgelu", "openai")
    with caplog.at_level(logging.WARNING, logger="valley"):
        load_pretrained(tower, config)
    said = [record.getMessage() for record in caplog.records if record.name == "valley.model.vision"]
    assert len(said) == 1
    assert said[0].startswith("THE VISION TOWER ViT-B-32-quickgelu IS RANDOM: its weights 'openai' cannot be had")
    assert "out of reach" in said[0]
    assert config.pretrained is None
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_saved_configuration_builds_the_same_tower_without_open_clips_registry(tmp_path: Path) -> None:
    config = ValleyVisionConfig(name="no-such-name", tower=TINY_CLIP, hidden_size=32, num_patches=4, size_px=28)
    config.save_pretrained(tmp_path)
    loaded = ValleyVisionConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert VisionTower(loaded).visual.state_dict().keys() == VisionTower(config).visual.state_dict().keys()
