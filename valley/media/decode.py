"""The frames on screen at given times, whatever the file and the decoder.

The frame at time t is the last one whose presentation time is not after t; time runs from the first frame. Files are
opened and decoded in a child process (`valley.media.sandbox`), so that none of them can hang or kill this one. Frames
come back a few at a time and are resized as they come: a long clip never stands in memory at full size.

Decoders:

    pyav        scans the packets, then decodes only what the wanted frames need, or everything when something is odd
    decord      the same frames of 8-bit H.264 with a constant frame rate in mp4, mov and Matroska; other files are read
                by pyav, and a note says so. Truncation is told, damage in the middle is not
    torchcodec  likewise for the files it gets right; needs FFmpeg's libraries on the system
    auto        what measured fastest and right, which is pyav for every container and codec: see `BENCHMARKS.md`
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8

from valley.errors import DamagedMediaError, SettingsError, UnsupportedMediaError
from valley.media import sandbox
from valley.media.limits import Limits
from valley.media.probe import MediaInfo
from valley.media.sampling import TOLERANCE_S, Sampling, sample_times

__all__ = ["Decoder", "Frames", "Limits", "read_frames", "sample_clip"]

Decoder = Literal["auto", "pyav", "decord", "torchcodec"]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "longest", "squash"]


@dataclass(frozen=True)
class Frames:
    """Frames of a clip.

    Attributes:
        pixels: RGB.
        times_s: the time asked for that each frame was on screen at, in seconds from the first frame of the clip.
        notes: what is unusual: damage that was left out, another decoder than the one asked for.
    """

    pixels: UInt8[np.ndarray, "T H W 3"]
    times_s: tuple[float, ...]
    notes: tuple[str, ...] = ()


def read_frames(
    source: str | Path | bytes,
    times_s: Sequence[float],
    *,
    decoder: Decoder = "auto",
    size_px: int | None = None,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    limits: Limits | None = None,
) -> Frames:
    """Returns the frames on screen at the given times; of a still image, its one picture whatever the times.

    Args:
        source: a path, or the bytes of a file.
        times_s: in seconds from the first frame; behind the end, the last frame is still on screen.
        decoder: which library decodes, see above.
        size_px: side of the squares that frames are resized and cropped to, each as it comes; None: as they are.
        interpolation: see `valley.media.transform.resize_crop`.
        resize_mode: likewise.
        limits: what it may cost, and what becomes of damaged files; None: the defaults.

    Raises:
        MediaError: the file cannot be used; which error it is says why.
        SettingsError: the decoder is unknown, not installed, or cannot be loaded.
        OSError: the storage failed; the file is not to blame.
    """
    if not len(times_s) or not all(0 <= time < float("inf") for time in times_s):
        raise ValueError(f"times_s: expected times of 0 s or more, at least one, found {list(times_s)[:10]}")
    limits = limits or Limits()
    with _reading(source, decoder, limits) as reading:
        times = [0.0] if reading.info["kind"] == "image" else list(times_s)
        return _read(reading, times, _Resize(size_px, interpolation, resize_mode), limits)


def sample_clip(
    source: str | Path | bytes,
    sampling: Sampling,
    *,
    decoder: Decoder = "auto",
    size_px: int | None = None,
    interpolation: Interpolation = "bicubic",
    resize_mode: ResizeMode = "shortest",
    limits: Limits | None = None,
) -> Frames:
    """Returns the frames of a clip that `sampling` chooses, in one opening of the file: what production uses.

    Duration and frame times are the packets', not the header's. Arguments and errors are those of `read_frames`.
    """
    limits = limits or Limits()
    with _reading(source, decoder, limits) as reading:
        times = sample_times(MediaInfo(**reading.info), sampling, reading.times_s)
        return _read(reading, times, _Resize(size_px, interpolation, resize_mode), limits)


@dataclass(frozen=True)
class _Resize:
    size_px: int | None
    interpolation: Interpolation
    resize_mode: ResizeMode

    def __call__(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
        if self.size_px is None:
            return frame
        from valley.media.transform import resize_crop  # torch: not needed by those who only import the settings

        square: UInt8[np.ndarray, "S S 3"] = resize_crop(
            frame[None], self.size_px, interpolation=self.interpolation, resize_mode=self.resize_mode
        )[0]
        return square


def _reading(
    source: str | Path | bytes, decoder: Decoder, limits: Limits
) -> contextlib.AbstractContextManager[sandbox.Reading]:
    if decoder not in get_args(Decoder):
        raise SettingsError([f"decoder: expected one of {', '.join(get_args(Decoder))}, found {decoder}"])
    if decoder not in ("auto", "pyav") and importlib.util.find_spec(decoder) is None:
        raise SettingsError([f"decoder: {decoder} is not installed; auto works without it"])
    return sandbox.reading(source, limits, decoder=decoder, frames=True)


def _read(reading: sandbox.Reading, times: Sequence[float], resize: _Resize, limits: Limits) -> Frames:
    """Reads the frames at `times`, each of them once, and puts those that are whole in order."""
    shown = np.searchsorted(reading.times_s, np.asarray(times) + TOLERANCE_S, side="right") - 1
    rows = {position: np.flatnonzero(shown == position) for position in np.unique(shown).tolist()}
    pixels: UInt8[np.ndarray, "T h w 3"] | None = None
    came: set[int] = set()
    for position, frame in reading.pictures(list(rows)):
        picture = resize(frame)
        if pixels is None:
            pixels = np.empty((len(times), *picture.shape), np.uint8)
        if picture.shape != pixels.shape[1:]:
            raise UnsupportedMediaError(reading.name, "the size of its pictures changes, and no size_px was given")
        pixels[rows[position]] = picture
        came.add(position)
    whole = np.isin(shown, list(came - reading.lost))
    notes = list(reading.notes)
    if not whole.all():
        damage = f"{np.count_nonzero(~whole)} of the {len(times)} frames wanted are damaged"
        if limits.damaged == "reject" or not whole.any():
            raise DamagedMediaError(reading.name, damage)
        notes.append(f"{damage} and left out")
    assert pixels is not None  # at least one frame is whole
    kept = tuple(float(time) for time, is_whole in zip(times, whole, strict=True) if is_whole)
    return Frames(pixels if whole.all() else pixels[whole], kept, tuple(notes))
