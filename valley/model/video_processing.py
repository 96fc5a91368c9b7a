"""The part of the processor that handles pictures: any clip or image to uint8 frames of the tower's size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import BaseVideoProcessor, BatchFeature

from valley.media.transform import CLIP_MEAN, CLIP_STD, Frames, Interpolation, ResizeMode, Squares, resize_crop


class Framing(TypedDict):
    """How frames are brought to the tower's size; the arguments of `valley.media.transform.resize_crop`."""

    size_px: int
    interpolation: Interpolation
    resize_mode: ResizeMode


class ValleyVideoProcessor(BaseVideoProcessor):
    """Resizes and crops clips to the vision tower's size; frames of that size pass through untouched.

    Frames stay uint8 `[T, S, S, 3]`: a quarter of the bytes to move. The model normalises them with `image_mean` and
    `image_std` on the device that runs the tower. Clips come sampled; see `ValleyProcessor.sampling`.

    Args:
        size_px: side S of the square that the tower takes.
        image_mean: mean of each channel, of values in 0..1.
        image_std: standard deviation of each channel.
        interpolation: filter of the resize.
        resize_mode: how a frame is brought to the square, in open_clip's words.
    """

    model_input_names = ["pixel_values", "num_frames"]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def __init__(
        self,
        size_px: int = 224,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "shortest",
        **kwargs: Any,
    ) -> None:
        super().__init__(image_mean=tuple(image_mean), image_std=tuple(image_std), **kwargs)
        self.size_px = size_px
        self.interpolation = interpolation
        self.resize_mode = resize_mode

    def preprocess(self, videos: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepares clips and images, in the order given.

        Args:
            videos: one clip or a list, nested or not. A clip is a uint8 array or tensor `[T, H, W, 3]`, or a list of
                pictures (PIL, or `[H, W, 3]`).
            return_tensors: `pt` or `np`.
            kwargs: refused; there for the signature of the base class.

        Returns:
            `pixel_values`, uint8 `[F, S, S, 3]`: the frames of all clips one after the other; `num_frames`, `[M]`.

        Raises:
            ValueError: something that is not such a clip, or a clip without a frame.
        """
        if kwargs:
            raise TypeError(f"unknown arguments: {', '.join(kwargs)}")
        clips = [self.fit(clip) for clip in split_clips(videos)]
        if not clips:
            raise ValueError("no clip given")
        num_frames = np.array([len(clip) for clip in clips], dtype=np.int64)
        frames = clips[0] if len(clips) == 1 else np.concatenate(clips)
        return BatchFeature({"pixel_values": frames, "num_frames": num_frames}, tensor_type=return_tensors)

    def fit(self, clip: Any) -> Squares:
        """Returns one clip's frames at the tower's size."""
        frames = read_clip(clip)
        if frames.shape[1:3] == (self.size_px, self.size_px):
            return frames
        return resize_crop(frames, self.size_px, interpolation=self.interpolation, resize_mode=self.resize_mode)

    def to_dict(self) -> dict[str, Any]:
        """Returns what is saved: the constructor's arguments."""
        return {
            "video_processor_type": type(self).__name__,
            "size_px": self.size_px,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
        }


def order_clips(kinds: Sequence[str], *, videos: Any, images: Any) -> list[Any]:
    """Brings videos and images into the order of their places.

    Args:
        kinds: `video` or `image` for each place, in order.
        videos: one clip or a list, nested or not.
        images: one image or a list, nested or not.

    Raises:
        ValueError: more or fewer of a kind than places.
    """
    given = {"video": list(split_clips(videos)), "image": list(split_images(images))}
    for kind, clips in given.items():
        if kinds.count(kind) != len(clips):
            raise ValueError(f"{kinds.count(kind)} <{kind}> in the text, but {len(clips)} {kind}s given")
    queues = {kind: iter(clips) for kind, clips in given.items()}
    return [next(queues[kind]) for kind in kinds]


def split_clips(videos: Any) -> Iterator[Any]:
    """Yields every clip of a clip or of a list of clips, nested to any depth."""
    if videos is None:
        return
    if _rank(videos) == 4 or (isinstance(videos, list | tuple) and videos and all(map(_is_picture, videos))):
        yield videos
    elif isinstance(videos, list | tuple) or _rank(videos) == 5:
        for item in videos:
            yield from split_clips(item)
    else:
        raise ValueError(f"expected clips [T, H, W, 3], found {_describe(videos)}")


def split_images(images: Any) -> Iterator[Any]:
    """Yields every image of an image or of a list of images, nested to any depth, as a clip of one frame."""
    if images is None:
        return
    if _is_picture(images):
        yield [images]
    elif isinstance(images, list | tuple) or _rank(images) == 4:
        for item in images:
            yield from split_images(item)
    else:
        raise ValueError(f"expected images [H, W, 3], found {_describe(images)}")


def read_clip(clip: Any) -> Frames:
    """Returns a clip as one array.

    Raises:
        ValueError: not uint8 `[T, H, W, 3]` with T >= 1, nor pictures of one size.
    """
    if isinstance(clip, list | tuple):
        pictures = [np.asarray(item.convert("RGB")) if isinstance(item, Image.Image) else _array(item) for item in clip]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError("the pictures of one clip differ in size")
        frames = np.stack(pictures)
    else:
        frames = _array(clip)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise ValueError(f"expected uint8 frames [T, H, W, 3] with T >= 1, found {_describe(frames)}")
    return frames


def _array(value: Any) -> NDArray[Any]:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _rank(value: Any) -> int:
    return value.ndim if isinstance(value, np.ndarray | torch.Tensor) else 0


def _is_picture(value: Any) -> bool:
    return isinstance(value, Image.Image) or _rank(value) == 3


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
