"""The elements of Matroska and WebM files: a number that says what it is, a size, and what is inside."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .orientation import Orientation, of_angle

SEGMENT = 0x18538067
_TRACKS, _TRACK, _TRACK_TYPE, _VIDEO = 0x1654AE6B, 0xAE, 0x83, 0xE0
_PROJECTION, _YAW, _ROLL = 0x7670, 0x7673, 0x7675
_VIDEO_TRACK = b"\x01"
_HEAD_BYTES = 12
_MOST_ELEMENTS = 1000
"""Elements looked at in search of one: what describes the tracks stands near the beginning."""


class Element(NamedTuple):
    """An element: its number, where its content starts, and where it ends; None: unknown, as in a live recording."""

    number: int
    start: int
    end: int | None


def elements(file: int, start: int, end: int) -> Iterator[Element]:
    """Yields the elements between two positions, one behind the other; stops at what is none, or has no known end."""
    for _ in range(_MOST_ELEMENTS):
        if start >= end:
            return
        head = os.pread(file, _HEAD_BYTES, start)
        number_bytes = 9 - head[0].bit_length() if head else 9
        if number_bytes > 4:
            return
        size, size_bytes = element_size(head, number_bytes)
        content = start + number_bytes + size_bytes
        yield Element(int.from_bytes(head[:number_bytes], "big"), content, None if size is None else content + size)
        if size is None:
            return
        start = content + size


def element_size(data: bytes, position: int) -> tuple[int | None, int]:
    """An EBML size and the bytes it takes; None when unknown."""
    first = data[position] if position < len(data) else 0
    length = 9 - first.bit_length()
    if length > 8:
        return None, 0
    most = (1 << 7 * length) - 1
    value = int.from_bytes(data[position : position + length], "big") & most
    return (None if value == most else value), length


def orientation_of(file: int, file_bytes: int) -> Orientation:
    """Returns how the first video track is shown."""
    whole = Element(0, 0, file_bytes)
    for segment in _inside(file, whole, SEGMENT, file_bytes):
        for tracks in _inside(file, segment, _TRACKS, file_bytes):
            for track in _inside(file, tracks, _TRACK, file_bytes):
                kind = next(_inside(file, track, _TRACK_TYPE, file_bytes), None)
                if kind is not None and os.pread(file, 1, kind.start) == _VIDEO_TRACK:
                    return _projected(file, track, file_bytes)
    return Orientation()


def _projected(file: int, track: Element, file_bytes: int) -> Orientation:
    for video in _inside(file, track, _VIDEO, file_bytes):
        for projection in _inside(file, video, _PROJECTION, file_bytes):
            roll, yaw = (_number(file, projection, name, file_bytes) for name in (_ROLL, _YAW))
            return of_angle(roll, mirrored=abs(yaw) == 180)  # seen from behind
    return Orientation()


def _inside(file: int, parent: Element, number: int, file_bytes: int) -> Iterator[Element]:
    end = file_bytes if parent.end is None else min(parent.end, file_bytes)
    return (element for element in elements(file, parent.start, end) if element.number == number)


def _number(file: int, parent: Element, number: int, file_bytes: int) -> float:
    found = next(_inside(file, parent, number, file_bytes), None)
    if found is None or found.end is None or found.end - found.start not in (4, 8):
        return 0.0
    data = os.pread(file, found.end - found.start, found.start)
    return float(struct.unpack(">f" if len(data) == 4 else ">d", data)[0]) if len(data) in (4, 8) else 0.0
