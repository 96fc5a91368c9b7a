"""The frames wanted, by PyAV, decoding everything: slow, and right where a plan cannot be.

It is the arbiter when packets' times do not tell the pictures apart, when a plan failed, and of what damage touches.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import av
import numpy as np
from av.video.frame import VideoFrame

from .clip import Clip

_PACKET_IS_PICTURE = frozenset(("h264", "hevc", "vp9", "av1"))
"""Codecs of which every packet gives a picture, if the stream is progressive; others have empty packets, too."""


class Picture(NamedTuple):
    """A decoded picture and its place: its presentation time, or its number in a stream whose times say nothing."""

    place: int
    frame: VideoFrame


def read_exhaustively(clip: Clip, positions: Sequence[int]) -> Iterator[tuple[int, VideoFrame | None]]:
    """Yields the picture at each of `positions`: the last one not shown after the time of that position.

    At the end, yields None for the positions whose pictures never came or that damage touches, even where it gave one.
    """
    faults = list(clip.corrupt)
    all_come = clip.counted or (clip.codec in _PACKET_IS_PICTURE and not clip.interlaced)
    waiting = sorted(positions, reverse=True)
    lost: set[int] = set()
    latest: Picture | None = None
    for picture in chain(_decode_all(clip, faults), (None,)):
        while waiting and (picture is None or picture.place > _place(clip, waiting[-1])):
            position = waiting.pop()
            if latest is None or (all_come and latest.place != _place(clip, position)):
                lost.add(position)
            else:
                yield position, latest.frame
        latest = picture
    faults.sort()
    for position in positions:
        if position in lost or _is_touched(clip, position, faults):
            yield position, None


def _place(clip: Clip, position: int) -> int:
    return position if clip.counted else int(clip.pts[clip.shown[position]])


def _decode_all(clip: Clip, faults: list[int]) -> Iterator[Picture]:
    """Yields every picture; adds the packets at which the decoder stumbled to `faults`."""
    context = clip.decoder()
    times = clip.pts[clip.shown]
    count = 0
    for number, packet in enumerate(chain(clip.packets(), (None,))):
        try:
            frames = context.decode(packet)
        except MemoryError:
            raise
        except av.FFmpegError:
            faults.append(number)
            continue
        for frame in frames:
            if frame.is_corrupt and frame.pts is not None:
                faults.append(int(clip.shown[np.searchsorted(times, frame.pts, side="right") - 1]))
            if clip.counted:
                yield Picture(count, frame)
            elif frame.pts is not None:
                yield Picture(frame.pts, frame)
            count += 1
    context.flush_buffers()


def _is_touched(clip: Clip, position: int, faults: list[int]) -> bool:
    """Whether a fault lies between the keyframe that a picture hangs on and the picture."""
    if clip.counted:
        return bool(faults)  # a picture too few or too many, and the count is wrong
    packet = int(clip.shown[position])
    near = faults[bisect_left(faults, clip.key_before(packet)) : bisect_right(faults, packet)]
    return bool(near) and (clip.is_leading(packet) or not all(map(clip.is_leading, near)))
