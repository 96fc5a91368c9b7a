"""Pictures as the vision tower wants them: open_clip's own resize and crop, five to seven times faster.

open_clip resizes PIL images one by one. The uint8 kernel that torchvision v2 uses computes the same filter with the
same antialiasing on pictures that keep their channels last, as decoders write them: nowhere more than three levels from
PIL, on average a hundredth of a level when shrinking and up to a third when enlarging.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]
Frames = UInt8[np.ndarray, "T H W 3"]
Squares = UInt8[np.ndarray, "T S S 3"]

_LONG = 4
"""Pictures longer than this many squares are cropped before they are resized: the rest could be gigabytes."""
_REACH = 2
"""Pixels to each side that the wider of the filters takes in, where it does not shrink."""


def resize_crop(
    frames: Frames,
    size_px: int,
    *,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    fill: int = 0,
) -> Squares:
    """Returns the frames as squares of `size_px`, as open_clip's preprocessing makes them.

    Args:
        frames: RGB, of any size.
        size_px: side of the squares.
        interpolation: the filter; antialiased, like PIL's.
        resize_mode: `shortest` resizes the short side and crops the long one, `longest` resizes the long side and pads
            the short one with `fill`, `squash` ignores the aspect ratio.
        fill: level of the padding.
    """
    target = _resized(frames.shape[1], frames.shape[2], size_px, resize_mode)
    squares = np.empty((len(frames), size_px, size_px, 3), np.uint8)
    for square, frame in zip(squares, frames, strict=True):  # one by one: the picture at hand stays in the cache
        if max(target) > _LONG * size_px:
            square[:] = _middle(frame, target, size_px, interpolation)
            continue
        view = torch.from_numpy(np.require(frame, requirements=["C", "W"]))[None].permute(0, 3, 1, 2)
        resized = functional.interpolate(view, target, mode=interpolation, antialias=True)
        cropped = _crop_or_pad(resized, size_px, fill)
        square[:] = cropped[0].permute(1, 2, 0).numpy()
    return squares


def normalise(
    squares: UInt8[Tensor, "T S S 3"], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Float[Tensor, "T 3 S S"]:
    """Returns the squares as the tower's float32 input, on the device they are on."""
    levels = squares.permute(0, 3, 1, 2).float().div_(255)
    shape = (1, 3, 1, 1)
    return levels.sub_(levels.new_tensor(mean).view(shape)).div_(levels.new_tensor(std).view(shape)).contiguous()


def make_transform(
    size_px: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    fill: int = 0,
) -> Callable[[Frames | UInt8[Tensor, "T H W 3"]], Float[Tensor, "T 3 S S"]]:
    """Returns the whole transform of a tower: uint8 `[T, H, W, 3]`, array or tensor, to float32 `[T, 3, S, S]`."""

    def transform(frames: Frames | UInt8[Tensor, "T H W 3"]) -> Float[Tensor, "T 3 S S"]:
        array = frames.cpu().numpy() if isinstance(frames, Tensor) else frames
        squares = resize_crop(array, size_px, interpolation=interpolation, resize_mode=resize_mode, fill=fill)
        return normalise(torch.from_numpy(squares), mean, std)

    return transform


def _resized(height: int, width: int, size_px: int, resize_mode: ResizeMode) -> tuple[int, int]:
    """Height and width after resizing, rounded the way open_clip and torchvision round them."""
    if resize_mode == "squash":
        return size_px, size_px
    if resize_mode == "longest":
        ratio = max(height, width) / size_px
        return max(1, round(height / ratio)), max(1, round(width / ratio))
    if height <= width:
        return size_px, int(size_px * width / height)
    return int(size_px * height / width), size_px


def _middle(
    frame: UInt8[np.ndarray, "H W 3"], target: tuple[int, int], size_px: int, interpolation: Interpolation
) -> UInt8[np.ndarray, "S S 3"]:
    """The middle of a long strip as it would be resized to `target`, without the rest of it.

    PIL can resize a box that does not begin at a whole pixel, and looks beyond its edges; torch can do neither.
    """
    crop, box = [], []
    for length, resized in zip(frame.shape[:2], target, strict=True):
        scale = length / resized
        start = round((resized - size_px) / 2) * scale
        around = math.ceil(_REACH * max(scale, 1.0)) + 1
        first = max(math.floor(start) - around, 0)
        crop.append(slice(first, math.ceil(start + size_px * scale) + around))
        box.append((start - first, start + size_px * scale - first))
    (top, bottom), (left, right) = box
    picture = Image.fromarray(np.ascontiguousarray(frame[crop[0], crop[1]]))
    right, bottom = min(right, picture.width), min(bottom, picture.height)  # a rounding error may lie between them
    resampling = Image.Resampling[interpolation.upper()]
    return np.asarray(picture.resize((size_px, size_px), resampling, box=(left, top, right, bottom)))


def _crop_or_pad(pictures: UInt8[Tensor, "N 3 H W"], size_px: int, fill: int) -> UInt8[Tensor, "N 3 S S"]:
    height, width = pictures.shape[-2:]
    rows, columns = max(size_px - height, 0), max(size_px - width, 0)
    if rows or columns:
        padding = (columns // 2, (columns + 1) // 2, rows // 2, (rows + 1) // 2)
        pictures = functional.pad(pictures, padding, value=fill)
        height, width = pictures.shape[-2:]
    top, left = round((height - size_px) / 2), round((width - size_px) / 2)
    return pictures[..., top : top + size_px, left : left + size_px]
