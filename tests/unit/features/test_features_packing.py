"""Tokens as bytes: what is kept of them, and how many bytes that is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from valley.features.identity import StoreHeader, TowerIdentity
from valley.features.packing import pack, packed_bytes, unpack
from valley.model.temporal import TEMPORAL

DIM, NUM_PATCHES = 6, 4
TOWER = TowerIdentity(
    name="tiny",
    weights="00",
    layer=-1,
    num_patches=NUM_PATCHES,
    dim=DIM,
    size_px=28,
    mean=[0.5] * 3,
    std=[0.5] * 3,
    interpolation="bicubic",
    resize_mode="shortest",
)


def clip(num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    scale = torch.tensor([0.01, 1.0, 30.0, 0.0, 5.0, 1.0])  # a channel that is silent, and one that is loud
    return torch.randn(num_frames, 1 + NUM_PATCHES, DIM, generator=generator) * scale


def read_back(tokens: torch.Tensor, header: StoreHeader) -> torch.Tensor:
    packed = pack(tokens, header)
    assert len(packed) == packed_bytes(len(tokens), header)
    bits = unpack(packed, len(tokens), header)
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


@pytest.mark.parametrize("num_frames", [1, 5])
def test_bf16_tokens_come_back_to_the_bit(num_frames: int) -> None:
    tokens = clip(num_frames).to(torch.bfloat16)
    assert torch.equal(read_back(tokens, StoreHeader(tower=TOWER)), tokens)


def test_int8_is_off_by_half_a_step_of_each_channel_at_most() -> None:
    tokens = clip(7)
    found = read_back(tokens, StoreHeader(tower=TOWER, precision="int8")).float()
    step = tokens.abs().amax((0, 1)) / 127
    assert ((found - tokens).abs() <= 0.5 * step + tokens.abs() / 256 + 1e-30).all()
    assert (found[..., 3] == 0).all()


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_pooled_clip_is_the_whole_one_to_v1(precision: str) -> None:
    tokens = clip(8)
    found = read_back(
        tokens, StoreHeader.model_validate({"tower": TOWER, "precision": precision, "pooled": True})
    ).float()
    assert found.shape == tokens.shape
    mean, mask = TEMPORAL["v1"](dim=DIM, num_patches=NUM_PATCHES), torch.ones(1, 8, dtype=torch.bool)
    bound = tokens.abs().amax((0, 1)) / 100
    assert ((mean(found[None, :, 1:], mask) - mean(tokens[None, :, 1:], mask)).abs() <= bound).all()
    assert ((found[:, 0] - tokens[:, 0]).abs() <= bound).all()


def test_a_pooled_store_of_eight_frames_is_nearly_eight_times_smaller() -> None:
    large = TOWER.model_copy(update={"num_patches": 256, "dim": 1024})
    whole, pooled = (packed_bytes(8, StoreHeader(tower=large, pooled=pooled)) for pooled in (False, True))
    assert whole == 8 * 257 * 1024 * 2
    assert 7.7 < whole / pooled < 8
