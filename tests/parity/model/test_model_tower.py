"""The tower's tokens against open_clip's own forward pass, watched from outside by hooks."""

from typing import Any

import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image

from valley.model.configuration import ValleyVisionConfig
from valley.model.vision import VisionTower


def config_of(size_px: int, dim: int, layer: int, vision: dict[str, Any], embed_dim: int = 16) -> ValleyVisionConfig:
    tower = {"embed_dim": embed_dim, "quick_gelu": True, "vision_cfg": {"image_size": size_px, **vision}}
    patches = (size_px // vision["patch_size"]) ** 2
    return ValleyVisionConfig(
        tower=tower, hidden_size=dim, num_patches=patches, size_px=size_px, layer=layer, micro_batch=2
    )


def native(layer: int, **changes: Any) -> ValleyVisionConfig:
    return config_of(42, 32, layer, {"patch_size": 14, "width": 32, "head_width": 8, "layers": 4} | changes)


def timm(layer: int, name: str, dim: int, pool: str, size_px: int = 224, patch: int = 16) -> ValleyVisionConfig:
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "none", "patch_size": patch}
    return config_of(size_px, dim, layer, vision, embed_dim=dim)


TOWERS = {
    "clip": native,
    "without a norm before the blocks, pooled by the mean": lambda layer: native(
        layer, no_ln_pre=True, pool_type="avg", final_ln_after_pool=True
    ),
    "with layer scale": lambda layer: native(layer, ls_init_value=1e-1),
    "timm with a class token": lambda layer: timm(layer, "vit_tiny_patch16_224", 192, "token"),
    "eva with rotary positions": lambda layer: timm(layer, "eva02_tiny_patch14_224", 192, "token", patch=14),
    "timm without a class token": lambda layer: timm(layer, "vit_medium_patch16_gap_256", 512, "avg", 256),
}


def blocks_of(visual: Any) -> Any:
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


@pytest.mark.parametrize(("name", "layer"), [("clip", -1), ("clip", 0), *((name, -2) for name in TOWERS)])
def test_tokens_are_the_output_of_that_block_in_the_towers_own_forward_pass(name: str, layer: int) -> None:
    torch.manual_seed(0)
    config = TOWERS[name](layer)
    tower = VisionTower(config)
    for parameter in tower.parameters():
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    seen = {}
    block = blocks_of(tower.visual)[layer]
    block.register_forward_hook(lambda module, args, output: seen.update(block=output))
    pixels = torch.randn(3, 3, config.size_px, config.size_px)
    with torch.no_grad():
        tower.visual(pixels)
        expected = seen["block"]
        found = tower(pixels)
    assert found.shape == (3, 1 + config.num_patches, config.hidden_size)
    if "without a class token" not in name:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        features = tower.visual.trunk.forward_features(pixels)
        pooled = tower.visual.trunk.fc_norm(features.mean(1))
    torch.testing.assert_close(found[:, 0], pooled, rtol=1e-4, atol=1e-4)


def test_uint8_frames_give_what_open_clips_transform_of_them_gives() -> None:
    torch.manual_seed(0)
    config = native(-2)
    tower = VisionTower(config)
    frames = torch.randint(0, 256, (5, 42, 42, 3), dtype=torch.uint8)
    transform = image_transform(42, is_train=False, mean=tuple(config.mean), std=tuple(config.std))
    expected = torch.stack([transform(Image.fromarray(frame.numpy())) for frame in frames])
    torch.testing.assert_close(tower(frames), tower(expected), rtol=1e-5, atol=1e-5)
