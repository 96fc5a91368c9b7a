"""Whole models in small, random and built in code: for tests, demos and experiments on a laptop."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

TOWERS: dict[str, dict[str, Any]] = {
    # 16 patches of 56-px frames, 64 wide, 3 blocks of 4 heads
    "tiny": {
        "embed_dim": 64,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 56, "patch_size": 14, "width": 64, "head_width": 16, "layers": 3},
    },
    # 49 patches of 56-px frames, 256 wide, 2 blocks of 4 heads
    "small": {
        "embed_dim": 256,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 56, "patch_size": 8, "width": 256, "head_width": 64, "layers": 2},
    },
}
"""Vision towers as open_clip describes them, by the names that `model.vision.name` takes."""

_LLMS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "small": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 256**-0.5,  # the usual 0.02 suits a width of 2,500; here it keeps the MLPs silent for long
    },
}

LLMS = frozenset(_LLMS)
"""Language models by the names that `model.llm.name` takes; all share one small tokenizer."""


def miniature_llm_config(name: str, vocab_size: int) -> LlamaConfig:
    """Returns the LLaMA called `name`, one of `LLMS`, for a tokenizer of `vocab_size` tokens."""
    return LlamaConfig(vocab_size=vocab_size, max_position_embeddings=4096, **_LLMS[name])
