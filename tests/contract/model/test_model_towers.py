"""What every kind of open_clip tower must do inside a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from valley.model.configuration import ValleyConfig, ValleyVisionConfig
from valley.model.modeling import ValleyForConditionalGeneration

NATIVE = {"image_size": 28, "patch_size": 14, "width": 32, "head_width": 8, "layers": 2}
TOWERS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "clip": (NATIVE, 28, 32, 4),
    "pooled by the mean, layer scale": (NATIVE | {"pool_type": "avg", "ls_init_value": 0.1}, 28, 32, 4),
    "rotary positions": ({"timm_model_name": "eva02_tiny_patch14_224", "timm_proj": ""}, 224, 192, 256),
    "no class token": ({"timm_model_name": "vit_medium_patch16_gap_256", "timm_proj": ""}, 256, 512, 256),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    vision, size_px, width, num_patches = TOWERS[name]
    tower = ValleyVisionConfig(
        tower={"embed_dim": width, "vision_cfg": vision | {"image_size": size_px}},
        hidden_size=width,
        num_patches=num_patches,
        size_px=size_px,
    )
    text = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    names = ("image_start", "image_patch", "image_end", "video_start", "video_frame", "video_end")
    ids = {f"{name}_token_id": 30 + index for index, name in enumerate(names)}
    return ValleyForConditionalGeneration(ValleyConfig(vision_config=tower, text_config=text, **ids)).eval()


@pytest.mark.parametrize("name", TOWERS)
def test_a_saved_tower_gives_the_same_tokens_and_stays_frozen(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = ValleyForConditionalGeneration.from_pretrained(tmp_path).train()
    frames = torch.randint(0, 256, (2, *[model.config.vision_config.size_px] * 2, 3), dtype=torch.uint8)
    tokens = model.encode_frames(frames)
    assert tokens.shape == (2, 1 + model.config.vision_config.num_patches, model.config.vision_config.hidden_size)
    assert torch.equal(loaded.encode_frames(frames), tokens)
    assert not any(parameter.requires_grad for parameter in loaded.vision_tower.parameters())
    assert not any(module.training for module in loaded.vision_tower.modules())
    for (key, value), found in zip(model.named_buffers(), loaded.buffers(), strict=True):
        assert torch.equal(value, found), key
