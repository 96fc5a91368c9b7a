"""Frames by PyAV: planned where that is safe, everything decoded where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from .clip import Clip
from .exhaustive import read_exhaustively
from .orientation import of_angle
from .planned import DistrustError, can_plan, read_planned

Pixels = NDArray[np.uint8]


def read_pyav(clip: Clip, positions: Sequence[int]) -> Iterator[tuple[int, Pixels | None]]:
    """Yields (position, upright RGB picture `[H, W, 3]`) for each position in the order of presentation.

    None in place of a picture says that damage touches it, also when it was yielded before. Pictures are views that are
    good until the next one is asked for.
    """
    converter = VideoReformatter()
    for position, frame in _frames(clip, positions):
        yield position, None if frame is None else _upright_rgb(frame, converter, mirrored=clip.orientation.mirrored)


def _frames(clip: Clip, positions: Sequence[int]) -> Iterator[tuple[int, VideoFrame | None]]:
    left = set(positions)
    if can_plan(clip):
        try:
            for position, frame in read_planned(clip, positions):
                left.discard(position)
                yield position, frame
        except DistrustError:
            clip.decoder().flush_buffers()
    if left:
        yield from read_exhaustively(clip, sorted(left))


def _upright_rgb(frame: VideoFrame, converter: VideoReformatter, *, mirrored: bool) -> Pixels:
    rgb = converter.reformat(frame, format="rgb24", threads=1)
    plane = rgb.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)  # type: ignore[call-overload]
    pixels = rows[: rgb.height, : 3 * rgb.width].reshape(rgb.height, rgb.width, 3)
    # The frame's side data would tell all, but PyAV keeps a frame in memory whose side data was looked at.
    turned = of_angle(frame.rotation + 180, mirrored=True) if mirrored else of_angle(frame.rotation)
    return turned.upright(pixels)
