"""Converted weights, loaded in the usual way, against what the original code computes with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from published_makers import (
    BLOCKS,
    CLIP_MEAN,
    CLIP_STD,
    PUBLISHED_ORDER,
    Published,
    expected_logits,
    frames,
    make_llm,
    make_published,
    prefixed,
    write_bins,
    write_folder,
)
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import valley  # registers the model with the Auto classes
from valley.checkpoints.published import convert_published
from valley.model.tokenizer import tiny_tokenizer

CLIPS = [frames(5, seed=1), frames(2, seed=2)]
MESSAGES = [
    {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
    {"role": "assistant", "content": "A red ball."},
    {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "video"}]},
]


def load(folder: Path) -> tuple[Any, Any]:
    assert valley.ValleyConfig.model_type == "valley"
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(folder)


def inputs_of(processor: Any) -> Any:
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    return processor(text=[prompt], videos=[clip.numpy() for clip in CLIPS], return_tensors="pt")


def assert_same(folder: Path, made: Published, **expected: Any) -> tuple[Any, Any]:
    model, processor = load(folder)
    inputs = inputs_of(processor)
    with torch.no_grad():
        found = model(**inputs).logits[0]
    wanted = expected_logits(made, inputs["input_ids"][0].tolist(), CLIPS, **expected)
    assert wanted.std() > 0.3
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=1e-3, atol=1e-3)
    return model, processor


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_whole_checkpoint_computes_what_the_original_code_does(version: str, tmp_path: Path) -> None:
    made = make_published(version)
    source = write_folder(tmp_path / "source", made)

    assert convert_published(source, tmp_path / "target") == tmp_path / "target"

    model, processor = assert_same(tmp_path / "target", made)
    assert model.config.temporal == {"v1": "v1", "v2": "v2", "v3": "v3_table"}[version]
    assert model.config.placement == "after_projector"
    assert tuple(model.config.vision_config.mean) == CLIP_MEAN
    assert tuple(model.config.vision_config.std) == CLIP_STD
    assert (processor.sampling.mode, processor.sampling.num_frames) == ("fixed", 8)


@pytest.mark.parametrize("prefix", ["model.vision_tower.", "model.vision_tower.vision_tower.vision_model."])
def test_pickled_shards_and_every_name_that_the_tower_has_had_give_the_same_model(prefix: str, tmp_path: Path) -> None:
    made = make_published("v2")
    source = write_bins(tmp_path / "source", made, made.tensors(prefix))
    convert_published(source, tmp_path / "target")
    assert_same(tmp_path / "target", made)


@pytest.mark.parametrize(("select", "layer"), [(-1, -1), (None, -1), (1, 1), (-BLOCKS, -BLOCKS)])
def test_the_selected_state_of_the_tower_is_the_one_hugging_face_counts(
    select: int | None, layer: int, tmp_path: Path
) -> None:
    made = make_published("v1")
    made.config = {name: value for name, value in made.config.items() if name != "mm_vision_select_layer"}
    given = {} if select is None else {"mm_vision_select_layer": select}
    convert_published(write_folder(tmp_path / "source", made, **given), tmp_path / "target")
    assert_same(tmp_path / "target", made, layer=layer)


def test_a_delta_is_added_to_the_rows_that_the_base_has(tmp_path: Path) -> None:
    made = make_published("v1")
    base = make_llm(len(made.tokenizer) - len(PUBLISHED_ORDER))
    with torch.no_grad():  # fine-tuning moves the norms little
        for name, parameter in made.llm.named_parameters():
            if "norm" in name:
                parameter.copy_(base.get_parameter(name) + 0.01 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path / "base")
    delta = made.tensors()
    for name, theirs in base.state_dict().items():
        delta[name][: len(theirs)] -= theirs
    source = write_bins(tmp_path / "source", made, delta)

    convert_published(source, tmp_path / "target", tmp_path / "base")

    model, _ = assert_same(tmp_path / "target", made)
    added = made.tokenizer.convert_tokens_to_ids(["<im_start>", "<vi_end>"])
    torch.testing.assert_close(model.added_tokens.weight[[0, 5]], made.llm.get_input_embeddings().weight[added])


@pytest.mark.parametrize("file", ["pytorch_model.bin", "mm_projector.bin"])
def test_weights_of_pre_training_are_put_on_a_base_model_and_a_clip_tower(file: str, tmp_path: Path) -> None:
    made = make_published("v3")
    tokenizer = tiny_tokenizer()
    made.llm = make_llm(len(tokenizer))
    made.llm.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    source = write_folder(tmp_path / "source", made, tokenizer=False)
    (source / "model.safetensors").unlink()
    torch.save(made.visual_tensors(), source / file)
    made.clip.save_pretrained(tmp_path / "clip")
    if file == "mm_projector.bin":  # and a whole CLIP model, of which only the half that looks is needed
        other_half = {"text_model.final_layer_norm.weight": torch.ones(3), "logit_scale": torch.tensor(2.0)}
        other_half["visual_projection.weight"] = torch.ones(8, 32)
        save_file(prefixed("vision_model.", made.clip) | other_half, tmp_path / "clip" / "model.safetensors")
        whole = {"model_type": "clip", "vision_config": made.clip.config.to_dict()}
        (tmp_path / "clip" / "config.json").write_text(json.dumps(whole))

    convert_published(source, tmp_path / "target", tmp_path / "base", vision=tmp_path / "clip")

    made.llm.resize_token_embeddings(len(tokenizer) + 6, mean_resizing=False)
    with torch.no_grad():
        for rows in (made.llm.get_input_embeddings().weight, made.llm.lm_head.weight):
            rows[-6:] = rows[:-6].mean(0)
    _, processor = load(tmp_path / "target")
    made.tokenizer = processor.tokenizer
    assert_same(tmp_path / "target", made)


def test_the_prompt_and_the_ids_are_those_of_the_published_weights(tmp_path: Path) -> None:
    made = make_published("v1")
    convert_published(write_folder(tmp_path / "source", made), tmp_path / "target")
    model, processor = load(tmp_path / "target")

    names = ("image_start", "image_patch", "image_end", "video_start", "video_frame", "video_end")
    tokens = ["<im_start>", "<im_patch>", "<im_end>", "<vi_start>", "<vi_frame>", "<vi_end>"]
    assert [getattr(model.config, f"{name}_token_id") for name in names] == made.tokenizer.convert_tokens_to_ids(tokens)
    system, _, rest = processor.apply_chat_template(MESSAGES[:1], add_generation_prompt=True).partition("\n\n")
    assert system.startswith("You are Valley, a large language and vision assistant trained by ByteDance. You are able")
    assert rest == "### Human: <video>\nWhat moves?\n### Assistant:"


def test_an_answer_ends_at_the_stop_string_where_the_tokenizer_is_at_hand(tmp_path: Path) -> None:
    convert_published(write_folder(tmp_path / "source", make_published("v1")), tmp_path / "target")
    model, processor = load(tmp_path / "target")
    inputs = inputs_of(processor)
    length = inputs["input_ids"].shape[1]
    answer = processor.tokenizer.encode(" It rolls.\n### Human: And", add_special_tokens=False)

    def write(**options: Any) -> str:
        forced = {"prefix_allowed_tokens_fn": lambda row, ids: [answer[len(ids) - length]]}
        ids = model.generate(**inputs, **forced, **options, max_new_tokens=len(answer), do_sample=False)
        return processor.tokenizer.decode(ids[0, length:])

    assert write(**processor.stopping) == " It rolls.\n###"
    assert write() == " It rolls.\n### Human: And"  # with the string in its configuration, this would raise


def test_half_precision_stays_half_but_for_the_table(tmp_path: Path) -> None:
    made = make_published("v3")
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in made.tensors().items()}
    convert_published(write_folder(tmp_path / "source", made, halves), tmp_path / "target")
    with safe_open(tmp_path / "target" / "model.safetensors", framework="pt") as file:
        wide = {name for name in file.keys() if file.get_tensor(name).dtype != torch.float16}  # noqa: SIM118
        table = file.get_tensor("temporal.position_table")
    assert wide == {"standardisation.mean", "standardisation.std", "temporal.position_table"}
    assert torch.equal(table, halves["model.position_matrix"].float())


def test_the_command_converts_a_folder(tmp_path: Path) -> None:
    made = make_published("v2")
    source = write_folder(tmp_path / "source", made)
    clip = tmp_path / "clip"
    clip.mkdir()
    (tmp_path / "source-clip" / "config.json").rename(clip / "config.json")
    save_file(
        {name: t for name, t in made.tensors().items() if "position_ids" not in name}, source / "model.safetensors"
    )
    command = [sys.executable, "-m", "valley.checkpoints.published", source, tmp_path / "target", "--vision", clip]
    ran = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert ran.returncode == 0, ran.stderr
    assert_same(tmp_path / "target", made)
