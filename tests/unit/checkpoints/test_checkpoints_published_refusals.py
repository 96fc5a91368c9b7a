"""What cannot be converted is refused by name, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_makers import Published, make_llm, make_published, write_folder
from torch import Tensor

from valley.checkpoints.published import convert_published, main
from valley.checkpoints.published_config import tower_config
from valley.errors import CheckpointError
from valley.model.tokenizer import tiny_tokenizer

Q = "model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made() -> Published:
    return make_published("v2")


def refused(folder: Path, *args: Any, **options: Any) -> str:
    """The message of the refusal; nothing may have been written."""
    target = folder / "target"
    with pytest.raises(CheckpointError) as error:
        convert_published(folder / "source", target, *args, **options)
    assert not target.exists()
    return str(error.value)


@pytest.mark.parametrize(
    "name", [Q, "model.mm_projector.bias", "model.pooling_layer.weight", "model.layers.1.mlp.up_proj.weight"]
)
def test_a_missing_tensor_is_named(name: str, made: Published, tmp_path: Path) -> None:
    tensors = made.tensors()
    del tensors[name]
    write_folder(tmp_path / "source", made, tensors)
    assert refused(tmp_path).endswith(f"source: 1 tensor(s) missing: {name}")


def test_unknown_tensors_are_all_named(made: Published, tmp_path: Path) -> None:
    strange = {"model.temporal_gate.weight": torch.ones(2), "model.layers.7.mlp.up_proj.weight": torch.ones(2)}
    write_folder(tmp_path / "source", made, made.tensors() | strange)
    message = refused(tmp_path)
    assert "2 tensor(s) unknown" in message
    assert all(name in message for name in strange)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (Q, lambda tensor: tensor[:-1]),
        ("model.mm_projector.weight", lambda tensor: tensor.T.contiguous()),
        ("lm_head.weight", lambda tensor: tensor[:-1]),
        ("model.vision_tower.vision_model.embeddings.position_embedding.weight", lambda tensor: tensor[:-1]),
    ],
)
def test_a_wrong_shape_is_named_with_both_shapes(
    name: str, change: Callable[[Tensor], Tensor], made: Published, tmp_path: Path
) -> None:
    tensors = made.tensors()
    right, tensors[name] = tensors[name], change(tensors[name])
    write_folder(tmp_path / "source", made, tensors)
    found = f"{name} (expected {list(right.shape)}, found {list(tensors[name].shape)})"
    assert refused(tmp_path).endswith(f"1 tensor(s) of the wrong shape: {found}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_delta_transformer": True}, "use_patch_importance_pooling and use_delta_transformer are both set"),
        ({"use_patch_importance_pooling": False}, "unknown: model.pooling_layer.bias, model.pooling_layer.weight"),
        ({"mm_vision_select_layer": 0}, "mm_vision_select_layer is 0: not the output of one of the tower's 3 blocks"),
        ({"mm_vision_select_layer": -4}, "mm_vision_select_layer is -4"),
        ({"mm_vision_tower": "somebody/else"}, r"mm_vision_tower is 'somebody/else', .* \(--vision\)"),
        ({"mm_hidden_size": 48}, "mm_hidden_size is 48, but the tower is 32 wide"),
        ({"model_type": "valley_mistral"}, "model_type is 'valley_mistral'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}, r"expected \[1024, 1024\]"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, made: Published, tmp_path: Path
) -> None:
    write_folder(tmp_path / "source", made, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_published(tmp_path / "source", tmp_path / "target")


def test_a_tokenizer_without_the_six_tokens_is_refused(made: Published, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", made, tokenizer=False)
    tiny_tokenizer().save_pretrained(source)
    assert "the tokenizer lacks <im_start>, <im_patch>, <im_end>" in refused(tmp_path)


def test_without_a_tokenizer_or_weights_or_configuration_the_folder_is_named(made: Published, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", made, tokenizer=False)
    assert f"{source}: no tokenizer can be loaded" in refused(tmp_path)
    (source / "model.safetensors").unlink()
    assert f"{source}: no weights here" in refused(tmp_path)
    (source / "config.json").unlink()
    assert "config.json: cannot be read" in refused(tmp_path)


def test_added_tokens_need_rows_in_the_embedding(made: Published, tmp_path: Path) -> None:
    tensors = made.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][: len(made.tokenizer) - 2]
    write_folder(tmp_path / "source", made, tensors)
    ids = made.tokenizer.convert_tokens_to_ids(["<vi_start>", "<vi_end>"])
    assert f"the added tokens {ids} have no rows" in refused(tmp_path)


def test_a_delta_is_told_from_a_whole_model(made: Published, tmp_path: Path) -> None:
    base = make_llm(len(made.tokenizer) - 6)
    base.save_pretrained(tmp_path / "base")
    write_folder(tmp_path / "source", made)
    near = made.tensors()
    near["model.norm.weight"] = base.model.norm.weight.detach() + 0.01
    assert "this is no delta; leave the base out" in refused_as(tmp_path / "near", made, near, tmp_path / "base")
    delta = made.tensors()
    delta["model.norm.weight"] = torch.full((64,), 0.01)
    assert "differences to a base LLaMA; give it (--base)" in refused_as(tmp_path / "delta", made, delta)
    make_llm(len(made.tokenizer) + 9).save_pretrained(tmp_path / "large")
    message = refused_as(tmp_path / "other", made, delta, tmp_path / "large")
    assert f"the base has {len(made.tokenizer) + 9} tokens, the delta {len(made.tokenizer) + 2}" in message


def refused_as(folder: Path, made: Published, tensors: dict[str, Tensor], *args: Any) -> str:
    folder.mkdir()
    write_folder(folder / "source", made, tensors)
    return refused(folder, *args)


def test_weights_of_pre_training_need_a_base_and_a_tower(made: Published, tmp_path: Path) -> None:
    write_folder(tmp_path / "source", made, made.visual_tensors(), tokenizer=False)
    assert "model.layers.*" in (message := refused(tmp_path))
    assert "(--base)" in message
    tokenizer = tiny_tokenizer()
    make_llm(len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    message = refused(tmp_path, tmp_path / "base")
    assert "55 tensor(s) missing: model.vision_tower." in message
    assert "model.vision_tower.post_layernorm.bias" in message
    assert "no vision tower here; give the folder of its CLIP model (--vision)" in message


def test_a_folder_that_is_there_is_left_alone(made: Published, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", made)
    for target in (source, source / "config.json"):
        with pytest.raises(CheckpointError, match="exists already"):
            convert_published(source, target)
    assert json.loads((source / "config.json").read_text())["model_type"] == "valley"


def test_the_command_names_what_is_wrong(made: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_folder(tmp_path / "source", made, made.tensors() | {"model.odd": torch.ones(1)})
    assert main([str(source), str(tmp_path / "target")]) == 2
    assert "1 tensor(s) unknown: model.odd" in capsys.readouterr().err


def test_openais_towers_need_no_folder() -> None:
    tower = tower_config({"mm_vision_tower": "openai/clip-vit-large-patch14"}, Path("here"), None)
    assert (tower.hidden_size, tower.num_patches, tower.size_px, tower.layer) == (1024, 256, 224, -1)
    assert tower.tower is not None
    assert tower.tower["quick_gelu"]
    assert tower.tower["vision_cfg"]["layers"] == 24


def test_an_activation_that_the_tower_does_not_know_is_refused(made: Published, tmp_path: Path) -> None:
    write_folder(tmp_path / "source", made)
    clip = tmp_path / "source-clip" / "config.json"
    clip.write_text(json.dumps(json.loads(clip.read_text()) | {"hidden_act": "relu"}))
    assert "hidden_act 'relu'" in refused(tmp_path)
    shutil.rmtree(clip.parent)
    assert "--vision" in refused(tmp_path)
