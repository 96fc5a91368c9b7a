"""What a media file is, from its first bytes and its header; nothing is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from valley.media import sandbox
from valley.media.limits import Limits


@dataclass(frozen=True)
class MediaInfo:
    """What is known of a file; 0 stands for what it does not say.

    Attributes:
        kind: `video`, or `image` for a still image.
        container: such as mp4, webm, mpegts, gif, jpeg.
        codec: FFmpeg's name of the video codec; of an image, its format.
        duration_s: from the first frame to the end of the last.
        width: in pixels, when shown upright.
        height: in pixels, when shown upright.
        fps: frames a second, on average.
        rotation: degrees by which stored frames are turned counter-clockwise to be upright, once mirrored if need be.
        num_frames: how many there are, an estimate unless the packets were counted.
    """

    kind: Literal["video", "image"]
    container: str
    codec: str
    duration_s: float
    width: int
    height: int
    fps: float
    rotation: int
    num_frames: int


def probe(source: str | Path | bytes, limits: Limits | None = None) -> MediaInfo:
    """Returns what the header of a file says.

    Args:
        source: a path, or the bytes of a file.
        limits: what the file may cost; None: the defaults.

    Raises:
        MediaError: the file cannot be used; which error it is says why.
        OSError: the storage failed; the file is not to blame.
    """
    limits = limits or Limits()
    with sandbox.reading(source, limits, decoder="auto", frames=False) as reading:
        return MediaInfo(**reading.info)
