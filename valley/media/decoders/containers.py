"""What a file is, from its first bytes.

Names lie, and FFmpeg follows playlists and scripts wherever they point. Only what is listed here is ever handed to a
demuxer, and then with that very demuxer named.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .problems import Problem

HEAD_BYTES = 1024


@dataclass(frozen=True)
class Container:
    """A container format.

    Attributes:
        name: as shown to people.
        demuxer: FFmpeg's name for what opens it; Pillow's for images.
        kind: whether it holds a video or a still image.
    """

    name: str
    demuxer: str
    kind: Literal["video", "image"] = "video"


MP4 = Container("mp4", "mov")
MOV = Container("mov", "mov")
MATROSKA = Container("matroska", "matroska")
WEBM = Container("webm", "matroska")
MPEG_TS = Container("mpegts", "mpegts")
MPEG_PS = Container("mpeg", "mpeg")
AVI = Container("avi", "avi")
FLV = Container("flv", "flv")
ASF = Container("asf", "asf")
GIF = Container("gif", "gif")
JPEG = Container("jpeg", "JPEG", "image")
PNG = Container("png", "PNG", "image")
WEBP = Container("webp", "WEBP", "image")
BMP = Container("bmp", "BMP", "image")

_PREFIXES = {
    b"\x1a\x45\xdf\xa3": MATROSKA,
    b"\x00\x00\x01\xba": MPEG_PS,
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": ASF,
    b"FLV\x01": FLV,
    b"GIF87a": GIF,
    b"GIF89a": GIF,
    b"\xff\xd8\xff": JPEG,
    b"\x89PNG\r\n\x1a\n": PNG,
}
_STILL_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heif", b"mif1", b"msf1")
_OLD_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_BITMAP_HEADERS = (12, 40, 52, 56, 64, 108, 124)
_PLAYLISTS = (b"<mpd", b"<smil", b"<asx")
_TEXTS = {
    "a playlist": (b"#extm3u", b"[playlist]", *_PLAYLISTS),
    "a concat script": (b"ffconcat",),
    "a web page": (b"<!doctype", b"<html", b"<head", b"<script"),
}


def recognise(head: bytes) -> Container:
    """Returns the container that a file beginning with `head` (its first `HEAD_BYTES`) is.

    Raises:
        Problem: it is none that we read.
    """
    for prefix, container in _PREFIXES.items():
        if head.startswith(prefix):
            return WEBM if container is MATROSKA and b"webm" in head[:64] else container
    if (found := _iso_media(head) or _riff(head) or _transport_stream(head) or _bitmap(head)) is not None:
        return found
    raise Problem("unsupported", _describe(head))


def _iso_media(head: bytes) -> Container | None:
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        if brand in _STILL_BRANDS:
            raise Problem("unsupported", f"a {brand.decode()} image, which is not read")
        return MOV if brand == b"qt  " else MP4
    return MOV if head[4:8] in _OLD_QUICKTIME else None


def _riff(head: bytes) -> Container | None:
    if head[:4] != b"RIFF":
        return None
    return {b"AVI ": AVI, b"WEBP": WEBP}.get(head[8:12])


def _transport_stream(head: bytes) -> Container | None:
    """Packets of 188 bytes begin with 0x47; Blu-ray puts four bytes before each."""
    for first, step in ((0, 188), (4, 192)):
        marks = head[first::step]
        if len(marks) >= 3 and set(marks) == {0x47}:
            return MPEG_TS
    return None


def _bitmap(head: bytes) -> Container | None:
    header_bytes = int.from_bytes(head[14:18], "little")
    return BMP if head[:2] == b"BM" and head[6:10] == bytes(4) and header_bytes in _BITMAP_HEADERS else None


def _describe(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith(b"<?xml"):
        name = "a playlist" if any(playlist in start for playlist in _PLAYLISTS) else "an XML document"
        return f"{name}, not a video or an image"
    for name, beginnings in _TEXTS.items():
        if start.startswith(beginnings):
            return f"{name}, not a video or an image"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "text, not a video or an image"
    return f"no container that is read (it begins with {head[:8].hex(' ')})"
