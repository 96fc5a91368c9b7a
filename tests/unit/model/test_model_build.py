"""From settings to a model: where its weights come from, and what is refused."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from valley.errors import ModelError
from valley.media.sampling import Sampling
from valley.model.build import build_model, load_language_model
from valley.model.conversation import ADDED_TOKENS
from valley.model.processing import build_processor, load_saved_processor
from valley.model.settings import LLMSettings, ModelSettings
from valley.model.tokenizer import tiny_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def settings(name: str = "tiny", **changes: Any) -> ModelSettings:
    llm = {"name": name} | changes.pop("llm", {})
    return ModelSettings.model_validate({"vision": {"name": "tiny", "pretrained": None}, "llm": llm} | changes)


def saved_backbone(folder: Path, *, spare_rows: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """A language model with its tokenizer, as it lies on the hub."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=len(tokenizer) + spare_rows, tie_word_embeddings=tied, **SHAPE)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return model


def test_the_tiny_model_learns_a_clip_by_heart() -> None:
    torch.manual_seed(0)
    model, processor = build_model(settings(temporal="v2"), seed=0), build_processor(settings(), Sampling())
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red circle moves left."}]},
    ]
    encoded = processor.encode(messages, [3])
    frames = torch.randint(0, 256, (3, processor.size_px, processor.size_px, 3), dtype=torch.uint8)
    inputs = {"pixel_values": frames, "num_frames": torch.tensor([3])}
    ids, labels = (torch.from_numpy(part)[None] for part in (encoded.input_ids, encoded.labels))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        loss = model(input_ids=ids, labels=labels, **inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    asked = processor(text=[prompt], videos=[frames.numpy()], return_tensors="pt")
    answer = model.generate(**asked, max_new_tokens=20)[0, asked["input_ids"].shape[1] :]
    assert answer[-1].item() in processor.stop_token_ids
    assert "A red circle moves left." in processor.tokenizer.decode(answer)


def test_one_seed_gives_one_model_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = (build_model(settings(temporal="v3"), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for name in ("projector.weight", "temporal.layer.linear1.weight"):
        assert not torch.equal(first[name], other[name])
    tower = "vision_tower.visual.conv1.weight"
    assert torch.equal(first[tower], other[tower]), "it never trains, and has a seed of its own"
    moved = settings(temporal="v3")
    moved = moved.model_copy(update={"vision": moved.vision.model_copy(update={"seed": 1})})
    assert not torch.equal(first[tower], build_model(moved, seed=1).state_dict()[tower])


def test_v2_starts_near_the_mean_on_tokens_of_unit_size() -> None:
    model = build_model(settings(temporal="v2"), seed=0)
    patches = torch.randn(8, 10, 16, 64)
    weights = model.temporal.score(patches.flatten(2)).softmax(1)
    assert weights.max() < 0.6


@pytest.mark.parametrize("temporal", ["v3", "v3_table"])
def test_v3_starts_by_adding_the_last_frame_in_some_channels_and_taking_it_off_in_others(temporal: str) -> None:
    scale = build_model(settings(temporal=temporal), seed=0).temporal.layer.norm2.weight
    assert set(scale.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare_rows", [0, 40])
def test_a_backbone_keeps_its_weights_and_gets_rows_at_the_mean(tmp_path: Path, spare_rows: int, tied: bool) -> None:
    backbone = saved_backbone(tmp_path, spare_rows=spare_rows, tied=tied)
    model = build_model(settings(str(tmp_path)), seed=0)
    known = len(tiny_tokenizer())
    ids = model.config.added_token_ids
    assert ids == list(range(known, known + 6))
    expected = backbone.state_dict()
    found = model.language_model.state_dict()
    for name, value in expected.items():
        rows = slice(known) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert torch.equal(found[name][rows], value[rows]), name
    table = expected["model.embed_tokens.weight"]
    mean = table[:known].mean(0)
    torch.testing.assert_close(model.added_tokens.weight, mean.expand(6, -1))
    torch.testing.assert_close(found["model.embed_tokens.weight"][ids], mean.expand(6, -1))
    head_mean = expected["lm_head.weight"][:known].mean(0)
    torch.testing.assert_close(found["lm_head.weight"][ids], head_mean.expand(6, -1))
    size = known + max(spare_rows, 6)
    assert found["lm_head.weight"].shape[0] == model.config.text_config.vocab_size == size
    if spare_rows:
        assert torch.equal(found["model.embed_tokens.weight"][known + 6 :], table[known + 6 :])


def test_a_head_with_a_bias_grows_too(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(tmp_path)
    model = build_model(settings(str(tmp_path)), seed=0)
    assert model.get_output_embeddings().weight.shape[0] == len(tokenizer) + 6


def test_generation_stops_where_answers_end_and_suppresses_the_added_tokens(tmp_path: Path) -> None:
    processor = build_processor(settings(), Sampling())
    model = build_model(settings(), seed=0)
    expected = processor.tokenizer.convert_tokens_to_ids(list(ADDED_TOKENS))
    model.save_pretrained(tmp_path)
    for made in (model, build_model(settings(path=str(tmp_path)), seed=0)):
        assert made.config.added_token_ids == expected
        assert made.generation_config.suppress_tokens == expected
        assert made.generation_config.eos_token_id == processor.stop_token_ids
        assert made.generation_config.pad_token_id == processor.tokenizer.pad_token_id


def test_a_saved_model_is_loaded_as_it_was_whatever_the_other_settings_say(tmp_path: Path) -> None:
    model = build_model(settings(temporal="v3", placement="after_projector"), seed=0)
    model.save_pretrained(tmp_path)
    loaded = build_model(settings(path=str(tmp_path), temporal="v1"), seed=9)
    assert (loaded.config.temporal, loaded.config.placement) == ("v3", "after_projector")
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.vision_tower.parameters())
    assert all(parameter.requires_grad for parameter in loaded.temporal.parameters())


def test_a_run_folder_stands_for_the_model_in_it(tmp_path: Path) -> None:
    model = build_model(settings(temporal="v3"), seed=3)
    model.save_pretrained(tmp_path / "model")
    build_processor(settings(), Sampling(fps=3.0)).save_pretrained(tmp_path / "model")
    chosen = settings(path=str(tmp_path))
    assert torch.equal(build_model(chosen, seed=0).projector.weight, model.projector.weight)
    assert build_processor(chosen, Sampling()).num_patches == 16
    assert load_saved_processor(str(tmp_path)).sampling == Sampling(fps=3.0)


@pytest.mark.parametrize(
    ("file", "kind"), [("manifest.json", "a training checkpoint"), ("base.json", "a low-rank update alone")]
)
def test_what_has_to_be_exported_first_is_refused_with_the_command(tmp_path: Path, file: str, kind: str) -> None:
    (tmp_path / file).write_text("{}")
    command = f"python -m valley.checkpoints.export {tmp_path} TARGET"
    for build in (lambda chosen: build_model(chosen, seed=0), lambda chosen: build_processor(chosen, Sampling())):
        with pytest.raises(ModelError, match=f"model.path: {tmp_path} is {kind}, not a model; .*{command}"):
            build(settings(path=str(tmp_path)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_dtype_and_attention_reach_every_part(tmp_path: Path, attention: str) -> None:
    saved_backbone(tmp_path / "backbone")
    for name in ("tiny", str(tmp_path / "backbone")):
        chosen = settings(name, llm={"attention": attention})
        model = build_model(chosen, seed=0, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / "whole")
        again = build_model(chosen.model_copy(update={"path": str(tmp_path / "whole")}), seed=0, dtype=torch.bfloat16)
        for made in (model, again):
            assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}
            assert made.language_model.config._attn_implementation == attention


def test_rotary_frequencies_keep_their_precision_in_bfloat16(tmp_path: Path) -> None:
    exact = build_model(settings(), seed=0).language_model.model.rotary_emb.inv_freq
    model = build_model(settings(), seed=0, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = build_model(settings(path=str(tmp_path)), seed=0, dtype=torch.bfloat16)
    for made in (model, again):
        assert torch.equal(made.language_model.model.rotary_emb.inv_freq, exact)


def test_random_weights_take_only_the_shape(tmp_path: Path) -> None:
    backbone = saved_backbone(tmp_path)
    model = build_model(settings(str(tmp_path), llm={"random_weights": True}), seed=0)
    found = model.language_model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    expected = backbone.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)


def test_weights_from_a_gguf_file_are_the_originals_and_can_be_saved(tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **SHAPE)
    original = LlamaForCausalLM(config).eval()
    write_gguf(tmp_path / "model.gguf", original)
    chosen = LLMSettings(name=str(tmp_path), gguf_file="model.gguf")
    model = load_language_model(chosen, vocab_size=50, dtype=torch.float32).eval()
    ids = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(model(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in AutoConfig.from_pretrained(tmp_path / "saved").to_dict()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Writes a LLaMA as llama.cpp does, its queries' and keys' halves interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.numpy().astype(np.float32)
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = array.reshape(heads, 2, array.shape[0] // heads // 2, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llm": {"name": "/no/such/folder"}}, "model.llm.name"),
        ({"template": "vicuna"}, "no template is called 'vicuna'"),
        ({"path": "/no/such/folder"}, "model.path: there is no /no/such/folder"),
    ],
)
def test_what_cannot_be_built_is_refused_by_its_setting(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        build_model(settings(**changes), seed=0)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    backbone = saved_backbone(tmp_path / "backbone")
    weights = backbone.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    backbone.save_pretrained(tmp_path / "backbone", state_dict=weights)
    with pytest.raises(ModelError, match=r"1 weights are missing: model.layers.1.mlp.up_proj.weight"):
        build_model(settings(str(tmp_path / "backbone")), seed=0)
    model = build_model(settings(), seed=0)
    weights = model.state_dict()
    del weights["projector.bias"]
    model.save_pretrained(tmp_path / "whole", state_dict=weights)
    with pytest.raises(ModelError, match=r"model.path: .* 1 weights are missing: projector.bias"):
        build_model(settings(path=str(tmp_path / "whole")), seed=0)


def test_a_folder_without_a_causal_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="no language model can be loaded"):
        load_language_model(LLMSettings(name=str(tmp_path)), vocab_size=10, dtype=torch.float32)
