"""The parts of the engine by themselves: draws, prefixes, backbones, packed weights, text from tokens."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from serving_makers import new_assistant
from training_makers import processor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from valley.assistant.writing import Writer
from valley.errors import EngineError
from valley.serving.engine.backbone import check_positions, prepare_backbone
from valley.serving.engine.drawing import draw, new_generator
from valley.serving.engine.interface import Decoding
from valley.serving.engine.packing import pack_linear_layers, serving_dtype
from valley.serving.engine.prefix import PrefixCache
from valley.serving.engine.slots import Chunk, Slots, Step

SIZE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
BACKBONES = {
    "llama": LlamaConfig(**SIZE),
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE),
    "mistral, window": MistralConfig(**SIZE, sliding_window=4),
    "llama, all heads": LlamaConfig(**{**SIZE, "num_key_value_heads": 4}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_compute_the_same_in_the_engine(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BACKBONES[name]).eval()
    embeds = torch.randn(20, 32)
    with torch.inference_mode():
        whole = model(inputs_embeds=embeds[None]).logits[0]
        slots = Slots(3, 32)
        prepare_backbone(model, slots)
        found = []
        # Slot 2 reads in chunks of 7, 1 and 6, then single tokens beside slot 0, which lies two behind.
        for start, length in ((0, 7), (7, 1), (8, 6)):
            step = Step(slots, [Chunk(2, start, length), Chunk(0, start, length)], [], [], torch.device("cpu"))
            part = embeds[start : start + length]
            logits = model(
                inputs_embeds=torch.cat([part, part])[None], position_ids=step.position_ids, use_cache=False, step=step
            ).logits[0]
            found.append(logits[:length])
        for place in range(14, 20):
            rows = [2] if place < 16 else [0, 2]
            positions = [place] if place < 16 else [place - 2, place]
            step = Step(slots, [], rows, positions, torch.device("cpu"))
            logits = model(
                inputs_embeds=embeds[positions][None], position_ids=step.position_ids, use_cache=False, step=step
            ).logits[0]
            found.append(logits[-1:])
            if len(rows) > 1:
                torch.testing.assert_close(logits[0], whole[place - 2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(found), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZE),  # caps its scores
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["gemma2", "gpt2"],
)
def test_other_backbones_are_right_or_refused(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    embeds = torch.randn(8, 32)
    with torch.inference_mode():
        whole = model(inputs_embeds=embeds[None]).logits[0]
        try:
            prepare_backbone(model, slots := Slots(2, 16))
        except EngineError:
            return
        step = Step(slots, [Chunk(1, 0, 8)], [], [], torch.device("cpu"))
        found = model(inputs_embeds=embeds[None], position_ids=step.position_ids, use_cache=False, step=step).logits[0]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


def test_draws_follow_temperature_and_top_p() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    counts: dict[tuple[float, float], np.ndarray] = {}
    for temperature, top_p in ((1.0, 1.0), (1.0, 0.8), (0.5, 1.0), (1.0, 1e-6)):
        decoding = Decoding(1, temperature, top_p, seed=3)
        random = new_generator(decoding)
        tokens = [int(draw(logits, [decoding], [random])[0]) for _ in range(4000)]
        counts[temperature, top_p] = np.bincount(tokens, minlength=4) / len(tokens)
    np.testing.assert_allclose(counts[1.0, 1.0], [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(counts[1.0, 0.8], [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(counts[0.5, 1.0], np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.03)
    assert counts[1.0, 1e-6][0] == 1


def test_tiny_temperatures_and_shares_choose_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for decoding in (Decoding(1, 1e-46, seed=1), Decoding(1, 1.0, 1e-46, seed=1), Decoding(1, 5e-324, 5e-324, seed=1)):
        tokens, usable = draw(logits, [decoding], [new_generator(decoding)])
        assert (int(tokens[0]), bool(usable[0])) == (1, True)


def test_a_row_that_cannot_be_used_is_told_and_changes_no_other() -> None:
    logits = torch.randn(3, 50)
    decodings = [Decoding(1, 1.0, seed=1), Decoding(1, 1.0, seed=2), Decoding(1)]
    alone = [int(draw(logits[row : row + 1], [one], [new_generator(one)])[0]) for row, one in enumerate(decodings)]
    broken = logits.clone()
    broken[1, 7] = float("nan")
    tokens, usable = draw(broken, decodings, [new_generator(one) for one in decodings])
    assert usable.tolist() == [True, False, True]
    assert [int(tokens[0]), int(tokens[2])] == [alone[0], alone[2]]
    broken[1, 7] = float("inf")
    assert draw(broken, decodings, [new_generator(one) for one in decodings])[1].tolist() == [True, False, True]


def snapshot(length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.full((2, length, 4), float(length)), torch.zeros(2, length, 4))]


def test_prefixes_are_found_by_their_longest_common_part_and_forgotten_by_use() -> None:
    size = 2 * 2 * 10 * 4 * 4
    cache = PrefixCache(2 * size)
    one, two, three = (np.arange(10) + start for start in (0, 100, 200))
    cache.add(one, snapshot(10))
    cache.add(two, snapshot(10))
    assert cache.find(np.array([0, 1, 2, 3, 99]))[0] == 4
    assert cache.find(one)[0] == 9  # the last token has to pass through the model
    assert cache.find(np.array([5, 1]))[0] == 0
    assert not cache.wants(one[:5])
    assert cache.wants(np.append(one, 11))
    cache.add(three, snapshot(10))  # `two` was used longest ago
    assert cache.find(two)[0] == 0
    assert cache.find(one)[0] == 9
    cache.add(np.append(one, 11), snapshot(11))  # holds all of `one`, which goes
    assert cache.num_bytes <= 2 * size
    cache.add(np.arange(1000), snapshot(1000))  # larger than everything
    assert cache.num_bytes <= 2 * size


@pytest.mark.parametrize(
    ("rope", "num_tokens", "is_fit"),
    [
        ({"rope_type": "default"}, 900, True),
        ({"rope_type": "llama3", "original_max_position_embeddings": 100}, 900, True),
        ({"rope_type": "dynamic"}, 512, True),
        ({"rope_type": "dynamic"}, 513, False),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 101, False),
        ({"full_attention": {"rope_type": "dynamic"}, "sliding_attention": {"rope_type": "default"}}, 513, False),
        (None, 900, True),
    ],
)
def test_positions_that_hang_on_other_answers_are_refused(
    rope: dict[str, Any] | None, num_tokens: int, is_fit: bool
) -> None:
    config = SimpleNamespace(rope_parameters=rope, max_position_embeddings=512)
    with contextlib.nullcontext() if is_fit else pytest.raises(EngineError, match="max_tokens"):
        check_positions(config, num_tokens)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_layers_laid_out_anew_compute_the_same_for_any_number_of_rows(dtype: torch.dtype, tolerance: float) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(40, 24, dtype=dtype)).eval()
    values = [torch.randn(2, rows, 40, dtype=dtype) for rows in (1, 3, 8, 100)]
    with torch.inference_mode():
        before = [layers(value) for value in values]
        assert pack_linear_layers(layers) == 1
        for value, expected in zip(values, before, strict=True):
            torch.testing.assert_close(layers(value), expected, rtol=tolerance, atol=tolerance)


def test_a_model_laid_out_anew_computes_the_same_and_keeps_its_embedding() -> None:
    assistant = new_assistant()
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        before = assistant.model(input_ids=ids).logits
        assert pack_linear_layers(assistant.model.language_model) == 2 * 7 + 1
        torch.testing.assert_close(assistant.model(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
    assert assistant.model.language_model.lm_head.weight.stride()[0] == 1
    assert assistant.model.get_input_embeddings().weight.is_contiguous()


def test_the_dtype_is_what_the_processor_is_fast_in() -> None:
    has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert serving_dtype("auto", torch.bfloat16, cpu) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert serving_dtype("auto", torch.float32, cpu) == torch.float32
    assert serving_dtype("auto", torch.bfloat16, gpu) == torch.bfloat16
    assert serving_dtype("float16", torch.bfloat16, cpu) == torch.float16


TEXTS = [
    "It moves to the left, then up. " * 12,
    "日本語のテキスト、そして絵文字 🎈🎉 in a row " * 5,
    "a\n\n  b   c\n" * 9,
    "naïve café – “quoted” " * 8,
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_told_in_pieces_is_the_text(text: str) -> None:
    tokens = processor().tokenizer.encode(text, add_special_tokens=False)
    writer = Writer(processor())
    pieces = [writer.add([token]) for token in tokens]
    last = writer.end()
    assert "".join([*pieces, last]) == text.strip() == writer.text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert sum(bool(piece) for piece in pieces) > 10


def test_a_stop_text_is_found_across_tokens_and_never_told_by_half() -> None:
    tokens = processor().tokenizer.encode("It is red. It is blue.", add_special_tokens=False)
    writer = Writer(processor(), ["red. It"])
    pieces = [writer.add([token]) for token in tokens]
    assert "".join(pieces) + writer.end() == "It is"
    assert writer.stopped
    half = Writer(processor(), ["blue. And"])
    told = "".join(half.add([token]) for token in tokens)
    assert "blue" not in told
    assert told + half.end() == "It is red. It is blue."
