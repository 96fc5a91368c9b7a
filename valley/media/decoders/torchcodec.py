"""Frames by torchcodec, which must find the very frames, at the very times, that the packets tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .clip import Clip
from .containers import MATROSKA, MOV, MP4, WEBM
from .problems import Problem, UnfitError

_SAME_TIME_S = 1e-3


def read(clip: Clip, positions: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields (position, upright RGB picture `[H, W, 3]`) for each position.

    Raises:
        UnfitError: torchcodec would get this file wrong, or failed.
        Problem: torchcodec cannot be loaded.
    """
    if clip.container not in (MP4, MOV, MATROSKA, WEBM):
        raise UnfitError(f"{clip.container.name} files")
    if len(clip.shown) != len(clip.pts):
        raise UnfitError("edit lists")
    if clip.counted or clip.interlaced or clip.cut or clip.corrupt:
        raise UnfitError("interlaced or damaged files")
    if clip.orientation.mirrored:
        raise UnfitError("mirrored pictures")
    try:
        library: Any = import_module("torchcodec.decoders")
    except (ImportError, RuntimeError) as error:
        reason = f"torchcodec cannot be loaded, perhaps for want of FFmpeg's libraries: {str(error).splitlines()[0]}"
        raise Problem("settings", f"decoder: {reason}") from None
    start_s = float(clip.pts[clip.shown[0]] * (clip.stream.time_base or 1))
    try:
        reader = library.VideoDecoder(
            f"/proc/self/fd/{clip.file.fileno()}", dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        if len(reader) != len(clip.shown):
            raise UnfitError(f"a file of {len(clip.shown)} frames in which it finds {len(reader)}")
        for position in positions:
            frame = reader.get_frame_at(position)
            if abs(frame.pts_seconds - start_s - clip.times_s[position]) > _SAME_TIME_S:
                raise UnfitError("this file: its times differ")
            yield position, frame.data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnfitError(f"this file: {str(error).strip().splitlines()[0]}") from None
