"""From the URL of an image or video in a request to its bytes: fetched, carried in the URL itself, or a local file.

Nothing else in this package opens what a request names. The bytes are not decoded here: that is done in a process that
may be killed (`valley.media.decode`).
"""

from __future__ import annotations

import asyncio
import binascii
import errno
import hashlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote

from pydantic import AfterValidator, PositiveInt

from valley.config import Location, Settings
from valley.errors import (
    EmptyMediaError,
    MediaLimitError,
    MissingMediaError,
    RefusedMediaError,
    StorageError,
    UnsupportedMediaError,
)
from valley.media.decoders.containers import GIF, HEAD_BYTES, JPEG, Container, recognise
from valley.media.decoders.problems import Problem
from valley.media.fetch import Fetcher, FetchSettings
from valley.media.limits import Limits

Kind = Literal["image", "video"]

_SCHEME_CHARACTERS = 8
_DATA_HEAD = re.compile(r"data:([a-z]+/[A-Za-z0-9.+-]+)((?:;[A-Za-z0-9-]+=[A-Za-z0-9._+-]*)*);base64,")
_DATA_HEAD_CHARACTERS = 256
_FRAME_LIST = "video/jpeg"
_SLICE_CHARACTERS = 1 << 20
"""Of base64, decoded at once: a whole number of fours."""
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""A link is not followed, and a pipe not waited for."""


def serving_limits() -> Limits:
    """Returns what one file of a request may cost: far less than one of a training set."""
    return Limits(
        deadline_s=20,
        deadline_s_per_frame=0.5,
        max_bytes=64 << 20,
        max_pixels=40_000_000,
        max_duration_s=3600,
        max_pictures=250_000,
        max_memory_bytes=2 << 30,
    )


def _no_uri(location: str) -> str:
    if "://" in location:
        raise ValueError("a folder on this machine, not a URI")
    return location


class SourceSettings(Settings):
    """Where the media of requests may come from, and what they may cost."""

    fetch: FetchSettings = FetchSettings()
    """What http and https URLs may lead to."""
    media_root: Annotated[Location, AfterValidator(_no_uri)] | None = None
    """Folder that `file://` URLs may name files in; null: none may."""
    max_bytes: PositiveInt = 64 << 20
    """Largest image or video, and largest frame list in all."""
    max_frames: PositiveInt = 128
    """Most frames of a frame list."""
    limits: Limits = serving_limits()
    """What decoding one image or video may cost."""


@dataclass(frozen=True)
class Source:
    """An image or a video of a request, not decoded.

    Attributes:
        data: the bytes of the file; of a frame list, those of each JPEG.
        digest: SHA-256, in hexadecimal, of what it is used as and of its bytes: the same for the same content only.
    """

    data: bytes | tuple[bytes, ...]
    digest: str


async def read_source(url: str, kind: Kind, settings: SourceSettings, fetcher: Fetcher, label: str) -> Source:
    """Returns the bytes that the URL of an image or video stands for.

        https://…                           fetched
        data:video/mp4;base64,…             any image or video, known by its bytes and not by the type stated
        data:video/jpeg;base64,…,…,…        a video as a list of frames
        file:///…                           below `media_root`

    Args:
        url: of the request, as it stands there.
        kind: what it is used as. An image may be a GIF; a video may be an image, and then has one frame.
        settings: where it may come from.
        fetcher: fetches http and https URLs.
        label: its place in the request, such as `messages[0].content[1]`, which is what errors call it.

    Raises:
        RefusedMediaError: the URL is malformed, or policy forbids to follow it.
        MediaLimitError: too many bytes or frames.
        UnsupportedMediaError: the bytes begin like no image or video that we read, or like a video used as an image.
        MissingMediaError: there is no such file below `media_root`.
        EmptyMediaError: the file has no bytes.
        UnreachableMediaError, FetchTimeoutError, FetchBusyError: see `Fetcher.fetch`.
        StorageError: the disk failed.
    """
    scheme = url[:_SCHEME_CHARACTERS].partition(":")[0].lower()  # and no copy of all the rest
    if scheme in ("http", "https"):
        data: bytes | tuple[bytes, ...] = await fetcher.fetch(url, label)
    elif scheme == "data":
        data = await asyncio.to_thread(_read_data_url, url, kind, settings, label)
    elif scheme == "file":
        data = await asyncio.to_thread(_read_file, url, settings, label)
    else:
        raise RefusedMediaError(label, "expected an https:, data: or file: URL")
    return await asyncio.to_thread(_source, data, kind, settings.max_bytes, label)


def _source(data: bytes | tuple[bytes, ...], kind: Kind, max_bytes: int, label: str) -> Source:
    if isinstance(data, tuple):
        return Source(data, _digest("frames", data))
    if not data:
        raise EmptyMediaError(label, "zero bytes")
    if len(data) > max_bytes:
        raise MediaLimitError(label, f"{len(data)} bytes, more than {max_bytes}")
    container = _recognise(data, label)
    if kind == "image" and container.kind == "video" and container is not GIF:
        raise UnsupportedMediaError(label, f"a video ({container.name}) in place of an image")
    return Source(data, _digest(kind, [data]))


def _recognise(data: bytes, label: str) -> Container:
    try:
        return recognise(data[:HEAD_BYTES])
    except Problem as problem:
        raise UnsupportedMediaError(label, problem.reason) from None


def _is_jpeg(data: bytes) -> bool:
    try:
        return recognise(data[:HEAD_BYTES]) is JPEG
    except Problem:
        return False


def _digest(use: str, parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256(f"{use} {' '.join(str(len(part)) for part in parts)}\n".encode())
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _read_data_url(url: str, kind: Kind, settings: SourceSettings, label: str) -> bytes | tuple[bytes, ...]:
    head = url[: url.find(",", 0, _DATA_HEAD_CHARACTERS) + 1]
    if (stated := _DATA_HEAD.fullmatch(head)) is None:
        raise RefusedMediaError(label, "expected data:TYPE;base64,DATA")
    mime = stated[1]
    if not mime.startswith(("image/", "video/")) and mime != "application/octet-stream":
        raise RefusedMediaError(label, "a data: URL of neither an image nor a video")
    if mime == _FRAME_LIST:
        if kind == "image":
            raise RefusedMediaError(label, "a list of frames in place of an image")
        return _frames(url, len(head), settings, label)
    _check_size(_decoded_bytes(url, len(head)), settings, label)
    return _base64(url, len(head), len(url), label)


def _frames(url: str, start: int, settings: SourceSettings, label: str) -> tuple[bytes, ...]:
    """The frames of a list; how many and how large they are is known before the first is decoded."""
    count = url.count(",", start) + 1
    if count > settings.max_frames:
        raise MediaLimitError(label, f"{count} frames, more than {settings.max_frames}")
    _check_size(_decoded_bytes(url, start), settings, label)
    frames = []
    for _ in range(count):
        end = url.find(",", start)
        end = len(url) if end < 0 else end
        frames.append(_base64(url, start, end, label))
        start = end + 1
    for number, frame in enumerate(frames):
        if not _is_jpeg(frame):
            raise UnsupportedMediaError(label, f"frame {number} of the list is no JPEG")
    return tuple(frames)


def _decoded_bytes(url: str, start: int) -> int:
    """At most two more than there really are."""
    return (len(url) - start) * 3 // 4


def _check_size(num_bytes: int, settings: SourceSettings, label: str) -> None:
    if num_bytes - 2 > settings.max_bytes:
        raise MediaLimitError(label, f"about {num_bytes} bytes, more than {settings.max_bytes}")


def _base64(url: str, start: int, end: int, label: str) -> bytes:
    """Decodes base64 of the standard alphabet, with all of its padding and nothing else in it.

    Slice by slice, for nothing else of this process runs while one is decoded.
    """
    if start == end:
        raise RefusedMediaError(label, "a data: URL without data")
    try:
        if (end - start) % 4 or url.endswith("===", start, end):
            raise ValueError("too much padding, which strict_mode lets pass, or too little")
        parts = []
        for place in range(start, end, _SLICE_CHARACTERS):
            part = url[place : min(place + _SLICE_CHARACTERS, end)]
            if place + len(part) < end and part.endswith("="):
                raise ValueError("padding in the middle, which ends a slice as it may end the whole")
            parts.append(binascii.a2b_base64(part, strict_mode=True))
        return b"".join(parts)
    except ValueError:
        raise RefusedMediaError(label, "not base64 (standard alphabet, padded, without line breaks)") from None


def _read_file(url: str, settings: SourceSettings, label: str) -> bytes:
    if settings.media_root is None:
        raise RefusedMediaError(label, "file: URLs are read by servers that have a media.media_root")
    parts = _parts_below_root(url, settings.media_root, label)
    try:
        descriptor = _open_below(settings.media_root, parts)
        try:
            return _read_regular(descriptor, settings.max_bytes, label)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise RefusedMediaError(label, "links are not followed") from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO, errno.EACCES, errno.EPERM):
            raise MissingMediaError(label, "no such file, or it may not be read") from None
        raise StorageError(f"{label}: {error.strerror or type(error).__name__}") from None


def _read_regular(descriptor: int, max_bytes: int, label: str) -> bytes:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise RefusedMediaError(label, "not a regular file")
    if status.st_size > max_bytes:
        raise MediaLimitError(label, f"{status.st_size} bytes, more than {max_bytes}")
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(status.st_size)


def _parts_below_root(url: str, root: str, label: str) -> list[str]:
    """The names on the way from the root to the file, by the text of the URL alone."""
    if not url.startswith("file:///") or "?" in url or "#" in url:
        raise RefusedMediaError(label, "expected file:///PATH, with no host, query or fragment")
    try:
        parts = unquote(url.removeprefix("file:///"), errors="strict").split("/")
    except UnicodeDecodeError:
        raise RefusedMediaError(label, "a file: URL that is not UTF-8") from None
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise RefusedMediaError(label, "a file: URL with empty, . or .. names, or NUL")
    above = list(Path(root).parts[1:])
    if parts[: len(above)] != above or len(parts) == len(above):
        raise RefusedMediaError(label, "not below the folder that files are read from")
    return parts[len(above) :]


def _open_below(root: str, parts: Sequence[str]) -> int:
    """Opens a file name by name, so that no link on the way is followed, not even one put there meanwhile."""
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in parts:
        try:
            below = os.open(part, _OPEN, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        descriptor = below
    return descriptor
