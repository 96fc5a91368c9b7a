"""Whether a file is as long as its own structure says.

A file cut short mostly still opens, and decoders hand out what is left without a word. Its outer structure tells:
boxes, elements, tags and chunks state their length, GIFs end with a mark, MPEG-TS comes in packets of one size. MPEG-PS
states nothing and is judged by its last packet alone, see `clip`.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable

from .boxes import boxes
from .containers import ASF, AVI, FLV, GIF, MATROSKA, MOV, MP4, MPEG_TS, WEBM, Container
from .elements import SEGMENT, element_size


def missing_bytes(file: int, container: Container, file_bytes: int) -> int:
    """Returns how many bytes a file (its descriptor) lacks at its end, at least: 0 when it is whole or does not say."""
    measure = _MEASURES.get(container)
    return max(0, measure(file, file_bytes) - file_bytes) if measure else 0


def _iso_media_end(file: int, file_bytes: int) -> int:
    """Where the last top-level box of an mp4 or mov ends.

    Text that was put behind a whole file, as an ID3 tag is, looks like a box of some size, but of a kind there is not.
    """
    return max(
        (box.end for box in boxes(file, 0, file_bytes) if box.end <= file_bytes or box.kind in _BOXES), default=0
    )


_BOXES = frozenset(
    {b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"uuid", b"meta", b"meco", b"pdin"}
) | {b"styp", b"moof", b"mfra", b"sidx", b"ssix", b"prft", b"emsg", b"imda", b"udta", b"PICT", b"junk"}
"""The kinds of boxes that a file is made of at its top level."""


def _matroska_end(file: int, file_bytes: int) -> int:
    """Where the segment of a Matroska file ends."""
    head = os.pread(file, 256, 0)
    header_bytes, length = element_size(head, 4)
    segment = 4 + length + (header_bytes or 0)
    if int.from_bytes(head[segment : segment + 4], "big") != SEGMENT:
        return 0
    segment_bytes, length = element_size(head, segment + 4)
    return 0 if segment_bytes is None else segment + 4 + length + segment_bytes


def _riff_end(file: int, file_bytes: int) -> int:
    """Where the first RIFF chunk ends; a recorder that never came to write it left 0."""
    (size,) = struct.unpack("<I", os.pread(file, 4, 4))
    return 0 if size in (0, 0xFFFFFFFF) else 8 + size


def _flv_end(file: int, file_bytes: int) -> int:
    """Where the last tag of an FLV ends."""
    position = 13
    while position + 11 <= file_bytes:
        position += 15 + int.from_bytes(os.pread(file, 3, position + 1), "big")
    return position if position >= file_bytes else position + 11


def _asf_end(file: int, file_bytes: int) -> int:
    """Where the last top-level object of an ASF file ends; that of a live recording has no size."""
    position = 0
    while position + 24 <= file_bytes:
        (size,) = struct.unpack("<Q", os.pread(file, 8, position + 16))
        if size < 24:
            break
        position += size
    return position


def _transport_stream_end(file: int, file_bytes: int) -> int:
    """Where the last packet of an MPEG-TS ends; Blu-ray puts four bytes before each."""
    packet_bytes = 188 if os.pread(file, 1, 188) == b"\x47" else 192
    return -(-file_bytes // packet_bytes) * packet_bytes


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
    FLV: _flv_end,
    ASF: _asf_end,
    MPEG_TS: _transport_stream_end,
    GIF: _gif_end,
}
