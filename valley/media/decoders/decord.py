"""Frames by decord, for the files it gets right: 8-bit H.264 of a constant frame rate in mp4 and Matroska.

Elsewhere it returns wrong frames without a word (variable frame rate, edit lists, gradual refresh), fails (AV1, GIF) or
hangs (MPEG-TS).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import decord
import numpy as np
from numpy.typing import NDArray

from . import nal
from .clip import Clip
from .containers import MATROSKA, MOV, MP4
from .problems import UnfitError

_UNEVEN_S = 1.5e-3
"""Matroska rounds times to milliseconds."""


def read(clip: Clip, positions: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields (position, upright RGB picture `[H, W, 3]`) for each position.

    Raises:
        UnfitError: decord would get this file wrong, or failed.
    """
    if (reason := _unfit(clip)) is not None:
        raise UnfitError(reason)
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(f"/proc/self/fd/{clip.file.fileno()}", num_threads=1)
        if len(reader) != len(clip.shown):
            raise UnfitError(f"a file of {len(clip.shown)} frames in which it finds {len(reader)}")
        for position in positions:
            yield position, reader[position].asnumpy()
    except decord.DECORDError as error:
        raise UnfitError(f"this file: {str(error).splitlines()[0]}") from None


def _unfit(clip: Clip) -> str | None:
    if clip.codec != "h264" or clip.container not in (MP4, MOV, MATROSKA):
        return f"{clip.codec} in {clip.container.name}"
    if clip.stream.codec_context.pix_fmt not in ("yuv420p", "yuvj420p"):
        return f"{clip.stream.codec_context.pix_fmt} pictures"
    if len(clip.shown) != len(clip.pts):
        return "edit lists"
    if clip.counted or clip.interlaced:
        return "interlaced pictures"
    if clip.orientation.mirrored:
        return "mirrored pictures"
    if clip.orientation.rotation and clip.container is MATROSKA:
        return "turned pictures in Matroska"
    if clip.cut or clip.corrupt:
        return "damaged files"
    if not _keyframes_are_complete(clip):
        return "streams that it cannot enter at every keyframe"
    steps = np.diff(clip.times_s)
    if len(steps) and steps.max() - steps.min() > _UNEVEN_S:
        return "variable frame rates"
    return None


def _keyframes_are_complete(clip: Clip) -> bool:
    """Whether every keyframe is an IDR picture, and none the start of a gradual refresh."""
    length_bytes = nal.length_bytes(clip.codec, clip.stream.codec_context.extradata or b"")
    keys = set(clip.keys)
    return all(
        any(header & 31 == nal.H264_IDR for header in nal.headers(memoryview(packet), length_bytes))
        for number, packet in enumerate(clip.packets())
        if number in keys
    )
