"""The boxes of mp4 and mov files: a size, a four-letter kind, and what is inside.

Files are numbers of descriptors here, read at positions: a demuxer may be using the file's own position.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .orientation import Orientation, of_matrix


class Box(NamedTuple):
    """A box: its kind, where its content starts, and where it ends: in a file cut short, behind the file's end."""

    kind: bytes
    start: int
    end: int


def boxes(file: int, start: int, end: int) -> Iterator[Box]:
    """Yields the boxes between two positions, one behind the other; stops at what is none."""
    while start + 8 <= end:
        head = os.pread(file, 16, start)
        size, kind = struct.unpack(">I4s", head[:8])
        content = 8
        if size == 1 and len(head) == 16:
            (size,) = struct.unpack(">Q", head[8:])
            content = 16
        if size == 0:  # to the end
            size = end - start
        if size < content or not kind.isascii() or not kind.decode().isprintable():
            return
        yield Box(kind, start + content, start + size)
        start += size


def orientation_of(file: int, file_bytes: int) -> Orientation:
    """Returns how the first video track is shown."""
    for movie in _inside(file, Box(b"", 0, file_bytes), b"moov"):
        for track in _inside(file, movie, b"trak"):
            media = next(_inside(file, track, b"mdia"), None)
            handler = media and next(_inside(file, media, b"hdlr"), None)
            if handler and _content(file, handler)[8:12] == b"vide":
                header = next(_inside(file, track, b"tkhd"), None)
                return _shown(_content(file, header)) if header else Orientation()
    return Orientation()


def _inside(file: int, parent: Box, kind: bytes) -> Iterator[Box]:
    return (box for box in boxes(file, parent.start, parent.end) if box.kind == kind)


def _content(file: int, box: Box) -> bytes:
    return os.pread(file, min(box.end - box.start, 128), box.start)


def _shown(track_header: bytes) -> Orientation:
    matrix_at = 52 if track_header[:1] == b"\x01" else 40
    if len(track_header) < matrix_at + 20:
        return Orientation()
    a, b, _, c, d = struct.unpack(">5i", track_header[matrix_at : matrix_at + 20])
    return of_matrix(a, b, c, d)
