"""Media files below a source's root, which is a folder or any fsspec URI.

Three things can go wrong, and they are not the same thing: a file is not there (`MissingMediaError`: a bad sample),
storage is out of order for a moment (tried again, later and later), or for good (`StorageError`: the job stops, because
the samples are not to blame).
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import stat
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from valley.errors import (
    MediaError,
    MediaLimitError,
    MissingMediaError,
    SettingsError,
    StorageError,
    UnsupportedMediaError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
_DENIED = (errno.EACCES, errno.EPERM)
_HTTP = re.compile(r"(?:https?|webdavs?)://")
_SEPARATOR = re.compile(r"[/\\]")
_PASSING_STATUS = (408, 425, 429)  # besides 5xx


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and how long to wait for storage that may come back.

    Attributes:
        retries: tries after the first.
        first_wait_s: longest wait before the first of them; each further one may wait twice as long.
        longest_wait_s: no wait is longer.
    """

    retries: int = 4
    first_wait_s: float = 0.5
    longest_wait_s: float = 30.0

    def run(self, path: str, operation: Callable[[], T], failures: tuple[type[Exception], ...] = (Exception,)) -> T:
        """Returns what `operation` returns, tried again while storage fails in a way that may pass.

        Args:
            path: what is read, for messages.
            operation: reads it; whatever error of Valley it raises goes through.
            failures: classes of exception that come from storage. Remote file systems raise classes of their own, so
                there it is every exception.

        Raises:
            MissingMediaError: there is no such file, or it may not be read.
            StorageError: every try failed.
        """
        for attempt in range(self.retries + 1):
            try:
                return operation()
            except MediaError:
                raise
            except failures as error:
                reason = _why_absent(error)
                if reason:
                    raise MissingMediaError(path, reason) from error
                if attempt == self.retries:
                    raise StorageError(f"{path}: {_describe(error)} ({attempt + 1} tries)") from error
                # Jitter, because many workers meet the same outage at the same moment.
                wait_s = random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2**attempt))
                logger.warning("%s: %s; next try in %.1f s", path, _describe(error), wait_s)
                time.sleep(wait_s)
        raise AssertionError("unreachable: the last try returns or raises")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that is there.

    Attributes:
        path: where it is, as shown in tables.
        address: what opens it: an absolute path with all links resolved, or a key of the remote file system.
        size_bytes: None where the remote does not say.
        modified: changes when the file does: its time of change, or the remote's version mark.
    """

    path: str
    address: str
    size_bytes: int | None
    modified: str | None


class Root:
    """A folder or fsspec URI that media paths are relative to. Nothing outside it is ever opened.

    Args:
        location: the folder or URI.
        retry: patience with storage.
        max_bytes: largest remote file that is read, and so held in memory; local files are left to the decoder, which
            checks for itself.
    """

    def __init__(self, location: str, *, retry: Retry | None = None, max_bytes: int = 4 << 30) -> None:
        self.location = location
        self.retry = retry or Retry()
        self.max_bytes = max_bytes
        self._remote: tuple[Any, str] | None = None
        if is_uri(location):
            filesystem, base = connect(location)
            if isinstance(filesystem, LocalFileSystem):
                self.location = base
            else:
                self._remote = filesystem, base.rstrip("/")
        self._folder = "" if self._remote else os.path.realpath(self.location)

    def __reduce__(self) -> tuple[Callable[..., Root], tuple[str, Retry, int]]:
        return _reopen, (self.location, self.retry, self.max_bytes)

    @property
    def is_local(self) -> bool:
        """Whether files below it are opened by path."""
        return self._remote is None

    def shown(self, path: str) -> str:
        """The path as tables and messages show it: below the root."""
        return f"{self.location.rstrip('/')}/{path}"

    def find(self, paths: Sequence[str]) -> StoredFile:
        """The first of several candidates that is there.

        Raises:
            MissingMediaError: none is, or the one that is leads outside the root.
            UnsupportedMediaError: it is not a file.
            StorageError: storage failed on every try.
        """
        absent: MissingMediaError | None = None
        for path in paths:
            try:
                if self._remote is None:
                    return self.retry.run(self.shown(path), partial(self._find_local, path), (OSError,))
                return self.retry.run(self.shown(path), partial(self._find_remote, path))
            except MissingMediaError as error:
                absent = absent or error
        if absent is None:
            raise ValueError("no candidate paths")
        raise absent

    def read(self, file: StoredFile) -> Path | bytes:
        """A local file's path, for the decoder to open; a remote file's bytes.

        Raises:
            MediaLimitError: a remote file is larger than `max_bytes`.
            MissingMediaError: it has gone.
            StorageError: storage failed on every try.
        """
        if self._remote is None:
            return Path(file.address)
        return self.retry.run(file.path, partial(self._read_remote, file))

    def _find_local(self, path: str) -> StoredFile:
        # The resolved path is what gets opened, so a link that is turned around later is not followed.
        address = os.path.realpath(f"{self._folder}/{path}")
        if not address.startswith(self._folder.rstrip("/") + "/"):
            raise MissingMediaError(self.shown(path), "leads outside the root")
        status = Path(address).stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise UnsupportedMediaError(self.shown(path), f"{kind}, not a file")
        return StoredFile(self.shown(path), address, status.st_size, str(status.st_mtime_ns))

    def _find_remote(self, path: str) -> StoredFile:
        assert self._remote is not None
        filesystem, base = self._remote
        if _climbs(path):
            raise MissingMediaError(self.shown(path), "leads outside the root")
        if _HTTP.search(self.location) and set(path) & {"?", "#"}:
            raise MissingMediaError(self.shown(path), "has a query or fragment of a URL, not only a path")
        address = f"{base}/{path}"
        info = filesystem.info(address)
        if info.get("type") == "directory":
            raise UnsupportedMediaError(self.shown(path), "a folder, not a file")
        marks = (
            info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")
        )
        modified = next((str(mark) for mark in marks if mark is not None), None)
        return StoredFile(self.shown(path), address, info.get("size"), modified)

    def _read_remote(self, file: StoredFile) -> bytes:
        assert self._remote is not None
        filesystem, _ = self._remote
        if file.size_bytes is not None and file.size_bytes > self.max_bytes:
            raise MediaLimitError(file.path, f"{file.size_bytes} bytes, more than {self.max_bytes}")
        if file.size_bytes is not None:
            content: bytes = filesystem.cat_file(file.address)
            if len(content) < file.size_bytes:
                raise ConnectionError(f"got {len(content)} of {file.size_bytes} bytes")
            return content
        with filesystem.open(file.address, "rb") as stream:
            content = stream.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise MediaLimitError(file.path, f"more than {self.max_bytes} bytes")
        return content


def _climbs(path: str) -> bool:
    """Whether a path leaves its folder, perhaps once it is unquoted, as a server and each proxy before it may do."""
    before = ""
    while path != before:
        if ".." in _SEPARATOR.split(path):
            return True
        before, path = path, urllib.parse.unquote(path)
    return False


def is_uri(location: str) -> bool:
    """Whether a location is an fsspec URI, plain (`s3://…`) or chained (`simplecache::s3://…`)."""
    return "://" in location or "::" in location


def connect(uri: str) -> tuple[Any, str]:
    """The fsspec file system behind a URI, and the path within it.

    Raises:
        SettingsError: the protocol is unknown, or its package is not installed.
    """
    try:
        filesystem, path = fsspec.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise SettingsError([f"{uri}: {error}"]) from None
    return filesystem, path


def _reopen(location: str, retry: Retry, max_bytes: int) -> Root:
    return Root(location, retry=retry, max_bytes=max_bytes)


def _why_absent(error: Exception) -> str | None:
    """Why this one file cannot be had, or None when storage is to blame."""
    number = error.errno if isinstance(error, OSError) else None
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) or number in _ABSENT or status in (404, 410):
        return "no such file"
    if isinstance(error, PermissionError) or number in _DENIED or status in (401, 403):
        return "may not be read"
    if status is not None and 400 <= status < 500 and status not in _PASSING_STATUS:
        return f"refused with status {status}"
    return None


def _http_status(error: Exception) -> int | None:
    """The HTTP status an object store's client hides in its exception, whatever the client."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status: object = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:  # aiohttp; google and adlfs; requests
        candidates = (getattr(error, "status", None), getattr(error, "code", None), getattr(error, "status_code", None))
        status = next((c for c in candidates if c is not None), getattr(response, "status_code", None))
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
