"""Whether a file is as long as its own structure says.

A file cut short mostly still opens, and decoders hand out what is left without a word. Its outer structure tells:
boxes, elements and chunks state their length, GIFs end with a mark. Formats that state nothing (MPEG-TS, MPEG-PS, FLV,
ASF) are judged by their last packet instead, see `clip`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

from .boxes import boxes
from .containers import AVI, GIF, MATROSKA, MOV, MP4, WEBM, Container


def missing_bytes(file: int, container: Container, file_bytes: int) -> int:
    """Returns how many bytes a file (its descriptor) lacks at its end, at least: 0 when it is whole or does not say."""
    measure = _MEASURES.get(container)
    return max(0, measure(file, file_bytes) - file_bytes) if measure else 0


def _iso_media_end(file: int, file_bytes: int) -> int:
    """Where the last top-level box of an mp4 or mov ends."""
    return max((box.end for box in boxes(file, 0, file_bytes)), default=0)


def _matroska_end(file: int, file_bytes: int) -> int:
    """Where the segment of a Matroska file ends."""
    head = os.pread(file, 256, 0)
    header_bytes, length = _element_size(head, 4)
    segment = 4 + length + (header_bytes or 0)
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return 0
    segment_bytes, length = _element_size(head, segment + 4)
    return 0 if segment_bytes is None else segment + 4 + length + segment_bytes


def _element_size(data: bytes, position: int) -> tuple[int | None, int]:
    """An EBML size and the bytes it takes; None when unknown, as in a live recording."""
    first = data[position] if position < len(data) else 0
    length = 9 - first.bit_length()
    if length > 8:
        return None, 0
    most = (1 << 7 * length) - 1
    value = int.from_bytes(data[position : position + length], "big") & most
    return (None if value == most else value), length


def _riff_end(file: int, file_bytes: int) -> int:
    """Where the first RIFF chunk ends; a recorder that never came to write it left 0."""
    (size,) = struct.unpack("<I", os.pread(file, 4, 4))
    return 0 if size in (0, 0xFFFFFFFF) else 8 + size


def _gif_end(file: int, file_bytes: int) -> int:
    """Where the end mark of a GIF stands: behind the end of the file when there is none."""
    with mmap.mmap(file, file_bytes, access=mmap.ACCESS_READ) as data:
        position = 13 + _palette_bytes(data[10]) if file_bytes > 10 else file_bytes
        while position < file_bytes and data[position] != 0x3B:
            if data[position] == 0x2C and position + 9 < file_bytes:
                position += 11 + _palette_bytes(data[position + 9])
            elif data[position] == 0x21:
                position += 2
            else:
                return 0  # not a block: the decoder will say more
            while position < file_bytes and data[position]:
                position += 1 + data[position]
            position += 1
    return position + 1


def _palette_bytes(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


_MEASURES: dict[Container, Callable[[int, int], int]] = {
    MP4: _iso_media_end,
    MOV: _iso_media_end,
    MATROSKA: _matroska_end,
    WEBM: _matroska_end,
    AVI: _riff_end,
    GIF: _gif_end,
}
