"""What a store of features was made with. Tokens of another tower, or of other pictures, are of no use to a model."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch

from valley.config import Settings
from valley.media.decode import Interpolation, ResizeMode
from valley.model.vision import VisionTower

FORMAT = 1
"""Raised when stores of an older kind must not be read."""


class TowerIdentity(Settings):
    """All that decides which tokens a frame becomes."""

    name: str
    """The tower, as open_clip calls it."""
    weights: str
    """Fingerprint of its weights, rounded to bf16: towers in fp32 and bf16 are the same."""
    layer: int
    """Block whose tokens are taken."""
    num_patches: int
    dim: int
    """Width D of a token."""
    size_px: int
    mean: list[float]
    std: list[float]
    interpolation: Interpolation
    resize_mode: ResizeMode

    def differences(self, other: TowerIdentity) -> list[str]:
        """One line for each field that `other` has otherwise."""
        mine, its = self.model_dump(), other.model_dump()
        return [f"{name}: {mine[name]}, not {its[name]}" for name in mine if mine[name] != its[name]]


class StoreHeader(Settings):
    """What `store.json` says of a store."""

    format: int = FORMAT
    tower: TowerIdentity
    precision: Literal["bf16", "int8"] = "bf16"
    """How a token is stored; `int8` has a scale for each channel of each file."""
    pooled: bool = False
    """Whether only the mean of the frames' patches is kept: all that v1 asks for, of no use to v2 and v3."""


def identify_tower(tower: VisionTower) -> TowerIdentity:
    """Returns the identity of a tower with its weights in place."""
    config = tower.config
    return TowerIdentity(
        name=config.name,
        weights=_fingerprint(tower),
        layer=config.layer,
        num_patches=config.num_patches,
        dim=config.hidden_size,
        size_px=config.size_px,
        mean=list(config.mean),
        std=list(config.std),
        interpolation=config.interpolation,
        resize_mode=config.resize_mode,
    )


def _fingerprint(tower: VisionTower) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tower.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return hasher.hexdigest()
