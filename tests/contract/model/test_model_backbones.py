"""What every language model must do under Valley, whatever its family; only its configuration is named here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from valley.model.configuration import ValleyConfig, ValleyVisionConfig
from valley.model.lora import add_lora, merge_adapter, merge_lora, save_adapter
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.settings import LoRASettings

SHAPE = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
SOFT = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}

BACKBONES = {
    "LlamaConfig": SHAPE,
    "LlamaConfig, tied": SHAPE | {"tie_word_embeddings": True},
    "MistralConfig": GROUPED | {"sliding_window": 6},
    "Qwen2Config": SHAPE | {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "Qwen3Config": GROUPED,
    "Gemma2Config": GROUPED | SOFT,
    "Gemma3TextConfig": GROUPED | {"final_logit_softcapping": 3.0},
    "CohereConfig": SHAPE | {"logit_scale": 0.25},
    "GraniteConfig": SHAPE | {"logits_scaling": 4.0, "embedding_multiplier": 6.0},
    "Olmo2Config": SHAPE,
    "Phi3Config": SHAPE,
    "SmolLM3Config": GROUPED,
    "GPTNeoXConfig": SHAPE,
    "GPT2Config": {"vocab_size": 72, "n_embd": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
    "OPTConfig": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "BloomConfig": {"vocab_size": 72, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
}
ADDED = range(60, 66)
PATCHES = 4


def build(name: str) -> Any:
    torch.manual_seed(0)
    tower = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "patch_size": 14, "width": 32, "head_width": 8, "layers": 2},
    }
    vision = ValleyVisionConfig(tower=tower, hidden_size=32, num_patches=PATCHES, size_px=28)
    text = getattr(transformers, name.split(",")[0])(**BACKBONES[name])
    names = ("image_start", "image_patch", "image_end", "video_start", "video_frame", "video_end")
    ids = {f"{name}_token_id": token for name, token in zip(names, ADDED, strict=True)}
    model = ValleyForConditionalGeneration(ValleyConfig(vision_config=vision, text_config=text, temporal="v3", **ids))
    with torch.no_grad():  # large enough for soft caps and scales to matter
        for parameter in model.language_model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.generation_config.pad_token_id = 0
    return model.eval()


def place(num_frames: int) -> list[int]:
    return [60, *[61] * PATCHES, 62, 63, *[64] * num_frames, 65]


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    rows = [[5, *place(3), 6, 7, 8, 9], [10, 11, 12, 13], [*place(1), 14, 15, 16]]
    length = max(map(len, rows))
    pads = [[0] * (length - len(row)) for row in rows]
    ids = [[*pad, *row] if left else [*row, *pad] for pad, row in zip(pads, rows, strict=True)]
    torch.manual_seed(1)
    frames = torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(ids).ne(0).long()}
    return inputs | {"pixel_values": frames, "num_frames": torch.tensor([3, 1])}


def labels_of(input_ids: torch.Tensor) -> torch.Tensor:
    labels = torch.full_like(input_ids, -100)
    for row, columns in enumerate(([13, 15], [1, 2, 3], [11])):
        labels[row, columns] = input_ids[row, columns]
    return labels


@pytest.mark.parametrize("name", BACKBONES)
def test_the_loss_on_supervised_positions_is_that_of_the_full_logits(name: str) -> None:
    model, inputs = build(name), batch()
    labels = labels_of(inputs["input_ids"])
    logits = model(**inputs).logits
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    found = model(**inputs, labels=labels)
    assert found.logits is None
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if caps := BACKBONES[name].get("final_logit_softcapping"):
        assert logits.abs().max() <= caps
    found.loss.backward()
    for part in ("temporal", "projector", "added_tokens", "llm"):
        assert all(value.grad is not None for value in model.module_parameters(part).values()), part


@pytest.mark.parametrize("name", BACKBONES)
def test_a_text_only_batch_touches_every_parameter(name: str) -> None:
    model = build(name).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.backward()
    for part in ("temporal", "projector", "added_tokens", "llm"):
        assert all(value.grad is not None for value in model.module_parameters(part).values()), part


@pytest.mark.parametrize("name", BACKBONES)
def test_answers_of_a_left_padded_batch_are_those_of_each_prompt_alone(name: str) -> None:
    model, inputs = build(name), batch(left=True)
    together = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)[:, -5:]
    media = ((0, 3, [3]), (0, 0, None), (3, 4, [1]))
    for row, (first, last, clips) in enumerate(media):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        part = {"pixel_values": inputs["pixel_values"][first:last], "num_frames": torch.tensor(clips)} if clips else {}
        alone = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            **part,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
        )
        assert alone[0, -5:].tolist() == together[row].tolist(), row


@pytest.mark.parametrize("name", BACKBONES)
def test_an_added_tokens_row_starts_as_the_backbone_would_embed_it(name: str) -> None:
    """With the rows copied over, Valley's own embeddings must be a detour that changes nothing."""
    model = build(name)
    ids = torch.tensor([[5, 60, 62, 63, 65, 6, 7]])
    expected = model.language_model(input_ids=ids).logits
    with torch.no_grad():
        model.added_tokens.weight.copy_(model.get_input_embeddings()(torch.tensor(list(ADDED))))
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_low_rank_update_merges_into_a_model_that_answers_the_same(name: str, tmp_path: Path) -> None:
    settings, updated, inputs = LoRASettings(rank=4, alpha=12), build(name), batch()
    plain_logits = updated(**inputs).logits
    add_lora(updated, settings, seed=1)
    with torch.no_grad():
        for value in updated.module_parameters("lora").values():
            value.normal_(std=0.1)
    expected = updated(**inputs).logits
    assert not torch.allclose(expected, plain_logits, atol=1e-2)

    merged, read = build(name), build(name)
    merged.load_state_dict(merge_lora(updated.state_dict(), settings))
    save_adapter(updated.module_parameters("lora"), settings, tmp_path, base="base", llm="llm")
    merge_adapter(tmp_path, read)

    torch.testing.assert_close(merged(**inputs).logits, expected, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(read(**inputs).logits, expected, atol=1e-3, rtol=1e-4)


LOAD = """
import json, sys
import torch
import valley
from transformers import AutoConfig, AutoModelForImageTextToText, AutoModelForMultimodalLM
inputs = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is valley.ValleyForConditionalGeneration
    assert type(AutoConfig.from_pretrained(folder)) is valley.ValleyConfig
    with torch.no_grad():
        loss = model(**inputs).loss.item()
    frozen = not any(p.requires_grad for p in model.vision_tower.parameters())
    print(json.dumps({"folder": folder, "loss": loss, "frozen": frozen, "training": model.training}))
assert type(AutoModelForMultimodalLM.from_pretrained(folder)) is valley.ValleyForConditionalGeneration
"""


def test_every_saved_model_loads_in_a_fresh_process_with_the_same_loss(tmp_path: Path) -> None:
    inputs = batch()
    inputs["labels"] = labels_of(inputs["input_ids"])
    torch.save(inputs, tmp_path / "inputs.pt")
    losses = {}
    for index, name in enumerate(BACKBONES):
        model = build(name)
        folder = tmp_path / str(index)
        model.save_pretrained(folder)
        losses[str(folder)] = model(**inputs).loss.item()
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "inputs.pt"), *losses],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert loaded.returncode == 0, loaded.stderr
    reports = [json.loads(line) for line in loaded.stdout.splitlines()]
    assert {report["folder"]: report["loss"] for report in reports} == pytest.approx(losses, rel=1e-6)
    assert all(report["frozen"] and not report["training"] for report in reports)
