"""The smallest whole model, random and built in code: for tests, demos and trying things on a laptop."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

TINY_TOWER: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "patch_size": 14, "width": 64, "head_width": 16, "layers": 3},
}
"""A vision tower as open_clip describes one: 16 patches of 56-px frames, 64 wide, 3 blocks of 4 heads."""


def tiny_llm_config(vocab_size: int) -> LlamaConfig:
    """Returns a LLaMA of two layers, 128 wide, for a tokenizer of `vocab_size` tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
