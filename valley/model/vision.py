"""The vision tower: an open_clip ViT, always frozen and in evaluation mode.

Only the visual half of a CLIP model is built, from the description that the configuration holds, so that a saved model
loads without asking for its tower's pretrained weights and can be built on the meta device.
"""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any, TypedDict

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from valley.errors import ModelError
from valley.model.configuration import ValleyVisionConfig
from valley.model.miniatures import TOWERS
from valley.model.settings import VisionSettings

logger = logging.getLogger(__name__)


def vision_config(settings: VisionSettings) -> ValleyVisionConfig:
    """Returns the configuration of a tower; loads no weights.

    Size, interpolation, mean and std are those of the pretrained tag; a file of weights, or none, gets open_clip's
    defaults.

    Raises:
        ModelError: no such tower or tag, not a ViT, no such block, or a tag whose weights need another activation.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    tower = _describe(settings.name)
    preprocess = merge_preprocess_dict(PreprocessCfg(), _describe_weights(settings, tower))
    with torch.device("meta"):
        visual = _build_visual(tower, settings.name)
    size_px, width, num_patches, num_blocks = _measure(visual, settings.name)
    if not -num_blocks <= settings.layer < num_blocks:
        raise ModelError(f"model.vision.layer: {settings.name} has {num_blocks} blocks, there is no {settings.layer}")
    return ValleyVisionConfig(
        name=settings.name,
        pretrained=settings.pretrained,
        tower=tower,
        layer=settings.layer,
        hidden_size=width,
        num_patches=num_patches,
        size_px=size_px,
        mean=list(preprocess["mean"]),
        std=list(preprocess["std"]),
        interpolation=preprocess["interpolation"],
        resize_mode=preprocess["resize_mode"],
        micro_batch=settings.micro_batch,
    )


def load_pretrained(tower: VisionTower, config: ValleyVisionConfig) -> None:
    """Puts the pretrained weights of `config` into a tower.

    Where they cannot be had (no network, nothing in the cache) the tower stays random; a warning says so, and so does
    `config` from then on.

    Raises:
        ModelError: weights that are there but do not fit.
    """
    if config.pretrained is None:
        if config.name not in TOWERS:
            logger.warning("THE VISION TOWER %s IS RANDOM: no pretrained weights are asked for.", config.name)
        return
    import open_clip

    try:
        model = open_clip.create_model(config.name, pretrained=config.pretrained, device="cpu")
    except (RuntimeError, OSError) as error:
        if Path(config.pretrained).is_file():
            raise ModelError(
                f"model.vision.pretrained: {config.pretrained} does not fit {config.name}: {error}"
            ) from error
        logger.warning(
            "THE VISION TOWER %s IS RANDOM: its weights %r cannot be had (%s). What is learned on top of it is worth "
            "nothing elsewhere.",
            config.name,
            config.pretrained,
            error,
        )
        config.pretrained = None
        return
    tower.visual.load_state_dict(model.visual.state_dict())


class VisionTower(nn.Module):
    """Frames in, one global token and P patch tokens a frame out; never trained.

    Tokens come from block `config.layer`, without the final norm. The global token is that block's class token; a tower
    without one gives its pooled token, from its last block.

    Args:
        config: what to build; the weights are random until they are loaded.
    """

    def __init__(self, config: ValleyVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.visual: Any = _build_visual(config.tower or TOWERS["tiny"], config.name)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> VisionTower:
        """Leaves the tower in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, frames: UInt8[Tensor, "F S S 3"] | Float[Tensor, "F 3 S S"]) -> Float[Tensor, "F N D"]:
        """Returns the tokens of each frame, N = 1 + P, the global one first, in the tower's own precision.

        Args:
            frames: uint8 frames, which are normalised here, or float frames that are normalised already.
        """
        return torch.cat([self._encode(self._normalise(part)) for part in torch.split(frames, self.config.micro_batch)])

    def _normalise(self, frames: UInt8[Tensor, "F S S 3"] | Float[Tensor, "F 3 S S"]) -> Float[Tensor, "F 3 S S"]:
        dtype = next(self.parameters()).dtype
        if frames.is_floating_point():
            return frames.to(dtype)
        mean, std = frames.new_tensor([self.config.mean, self.config.std], dtype=torch.float32)[:, :, None, None]
        return frames.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std).to(dtype)

    def _encode(self, pixels: Float[Tensor, "F 3 S S"]) -> Float[Tensor, "F N D"]:
        layer = self.config.layer
        if not hasattr(self.visual, "trunk"):
            found = self.visual.forward_intermediates(
                pixels,
                indices=[layer % len(self.visual.transformer.resblocks)],
                stop_early=True,
                intermediates_only=True,
                output_fmt="NLC",
                output_extra_tokens=True,
            )
            return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)
        trunk = self.visual.trunk
        has_class_token = trunk.cls_token is not None
        found = trunk.forward_intermediates(
            pixels,
            indices=[layer % len(trunk.blocks)],
            stop_early=has_class_token,
            output_fmt="NLC",
            return_prefix_tokens=has_class_token,
            intermediates_only=has_class_token,
        )
        if has_class_token:
            patches, prefix = found[0]
            return torch.cat([prefix[:, :1], patches], dim=1)  # what else stands in the prefix are registers
        last, [patches] = found
        return torch.cat([trunk.forward_head(last, pre_logits=True).unsqueeze(1), patches], dim=1)


class Moments(TypedDict):
    """What each of the D channels is brought to zero mean and unit deviation with."""

    mean: list[float]
    std: list[float]


class Standardisation(nn.Module):
    """Brings the tower's tokens to zero mean and unit deviation in each channel; the identity until it is set.

    It stands before the temporal module and is stored with the model, because it changes what v3 computes.

    Args:
        dim: width D of the tokens.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def reset_parameters(self) -> None:
        """Makes it the identity."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    @torch.no_grad()
    def set_moments(self, moments: Moments) -> None:
        """Sets it to what was measured."""
        self.mean.copy_(torch.tensor(moments["mean"]))
        self.std.copy_(torch.tensor(moments["std"]))

    def forward(self, tokens: Float[Tensor, "F N D"]) -> Float[Tensor, "F N D"]:
        """Returns `(tokens - mean) / std`, in the precision of the tokens, computed in that of the buffers."""
        return ((tokens - self.mean) / self.std).to(tokens.dtype)


def _describe(name: str) -> dict[str, Any]:
    if name in TOWERS:
        return TOWERS[name]
    import open_clip

    tower: dict[str, Any] | None = open_clip.get_model_config(name)
    if tower is None:
        close = ", ".join(difflib.get_close_matches(name, [*open_clip.list_models(), *TOWERS], n=5, cutoff=0.4))
        raise ModelError(f"model.vision.name: open_clip has no model {name!r}; close to it: {close or 'nothing'}")
    return tower


def _describe_weights(settings: VisionSettings, tower: dict[str, Any]) -> dict[str, Any]:
    if settings.pretrained is None or Path(settings.pretrained).is_file():
        return {}
    import open_clip

    weights: dict[str, Any] = open_clip.get_pretrained_cfg(settings.name, settings.pretrained)
    if not weights:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(settings.name)) or "none"
        reason = f"{settings.pretrained!r} is neither a file nor a tag of {settings.name}; tags: {tags}"
        raise ModelError(f"model.vision.pretrained: {reason}")
    if weights.get("quick_gelu", False) != tower.get("quick_gelu", False):
        other = settings.name.removesuffix("-quickgelu") if tower.get("quick_gelu") else f"{settings.name}-quickgelu"
        raise ModelError(
            f"model.vision: the weights {settings.pretrained!r} were trained with another activation than "
            f"{settings.name} has; name {other} instead"
        )
    return weights


def _build_visual(tower: dict[str, Any], name: str) -> nn.Module:
    # open_clip has no public way to build a tower without the text half of the model.
    from open_clip.model import CLIPVisionCfg, VisionTransformer, _build_vision_tower
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

    shape = CLIPVisionCfg(**tower["vision_cfg"] | {"timm_model_pretrained": False})
    visual: nn.Module = _build_vision_tower(tower["embed_dim"], shape, tower.get("quick_gelu", False))
    if not isinstance(getattr(visual, "trunk", visual), VisionTransformer | TimmVisionTransformer | Eva):
        raise ModelError(f"model.vision.name: {name} is not a ViT")
    return visual


def _measure(visual: Any, name: str) -> tuple[int, int, int, int]:
    """Returns a tower's frame size in pixels, width, patches a frame and number of blocks."""
    height_px, width_px = visual.image_size
    if height_px != width_px:
        raise ModelError(f"model.vision.name: {name} takes {width_px} x {height_px} pixels; only squares will do")
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        return height_px, trunk.embed_dim, trunk.patch_embed.num_patches, len(trunk.blocks)
    rows, columns = visual.grid_size
    return height_px, visual.transformer.width, rows * columns, len(visual.transformer.resblocks)
