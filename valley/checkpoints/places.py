"""Where checkpoints lie: a folder, or any fsspec URI such as `s3://bucket/run`.

A folder is written in place, and what is written last arrives by rename. An object store knows neither renames nor
folders: there, files are made on this machine's disk and uploaded, and an object is seen once all of it is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar
from urllib.parse import urlsplit

from upath import UPath

from valley.data.storage import Retry
from valley.errors import MissingMediaError, SettingsError, StorageError

T = TypeVar("T")

Place: TypeAlias = Path | UPath
"""A folder or file: `Path` on a file system of this machine, `UPath` elsewhere. Both read as a path does."""

_LOCAL = ("file", "local")
_RETRY = Retry()


def to_place(location: str) -> Place:
    """Returns the place that a path or URI names.

    Raises:
        SettingsError: the protocol is unknown, or its package is not installed.
    """
    if "://" not in location:
        return Path(location)
    parts = urlsplit(location)
    if parts.scheme in _LOCAL:
        return Path(parts.path)
    try:
        place = UPath(location, use_listings_cache=False)
        place.fs  # noqa: B018 - connects, or says which package is missing
    except (ValueError, ImportError) as error:
        raise SettingsError([f"{location}: {error}"]) from None
    return place


@contextmanager
def to_fill(folder: Place) -> Iterator[Path]:
    """Gives a new folder on disk whose files are in `folder`, and durable, once the block has ended.

    The copies of a remote folder lie below `$TMPDIR` meanwhile, always under the same name: what a killed process left
    there is cleared away by the next one.
    """
    if isinstance(folder, Path):
        folder.mkdir()
        yield folder
        sync_tree(folder)
        return
    key = hashlib.sha256(f"{folder.parent.parent} {folder.name}".encode()).hexdigest()[:16]
    filled = Path(tempfile.gettempdir()) / f"valley-checkpoint-{key}"
    shutil.rmtree(filled, ignore_errors=True)
    filled.mkdir()
    try:
        yield filled
        for file in files_below(filled):
            target = folder / file.relative_to(filled).as_posix()
            _patiently(target, partial(_upload, file, target))
    finally:
        shutil.rmtree(filled, ignore_errors=True)


@contextmanager
def on_disk(file: Place) -> Iterator[Path]:
    """Gives the file itself, or a copy of the same name that lasts as long as the block."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="valley-copy-") as temporary:
        copy = Path(temporary) / file.name
        _patiently(file, lambda: file.fs.get_file(file.path, str(copy)))
        yield copy


def write_whole(file: Place, text: str) -> None:
    """Writes a text file: it is the old one or the new one, never part of one."""
    if isinstance(file, Path):
        partly = file.with_name(f".{file.name}.partial")
        partly.write_text(text, encoding="utf-8")
        sync(partly)
        partly.rename(file)
        sync(file.parent)
        return

    def put() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.fs.pipe_file(file.path, text.encode())

    _patiently(file, put)


def read_text(file: Place) -> str:
    """Returns what a text file holds; raises FileNotFoundError when there is none."""
    if isinstance(file, Path):
        return file.read_text(encoding="utf-8")
    content: bytes = _patiently(file, lambda: file.fs.cat_file(file.path))
    return content.decode()


def read_range(file: Place, begin: int, end: int) -> bytes:
    """Returns the bytes of a file from `begin` to before `end`, without fetching the others."""
    if isinstance(file, Path):
        with file.open("rb") as source:
            source.seek(begin)
            return source.read(end - begin)
    content: bytes = _patiently(file, lambda: file.fs.cat_file(file.path, start=begin, end=end))
    return content


def size_of(file: Place) -> int | None:
    """Returns how many bytes a file has; None when there is none."""
    try:
        if isinstance(file, Path):
            return file.stat().st_size
        return int(_patiently(file, lambda: file.fs.size(file.path)))
    except FileNotFoundError:
        return None


def children(folder: Place) -> list[Place]:
    """Returns what a folder holds; nothing when there is none.

    Raises:
        OSError: storage failed, which must not be taken for an empty folder.
    """
    try:
        if isinstance(folder, Path):
            return list(folder.iterdir())
        listed: list[str] = _patiently(folder, lambda: folder.fs.ls(folder.path, detail=False))
    except FileNotFoundError:
        return []
    names = (entry.rstrip("/").rpartition("/")[2] for entry in listed)
    return [folder / name for name in names]


def files_below(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(place: Place) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    try:
        if not isinstance(place, Path):
            _patiently(place, lambda: place.fs.rm(place.path, recursive=True))
        elif place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
    except FileNotFoundError:
        return


def sync_tree(folder: Path) -> None:
    """Waits until all that is below a folder, names and bytes, is on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upload(file: Path, target: UPath) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.fs.put_file(str(file), target.path)


def _patiently(place: UPath, operation: Callable[[], T]) -> T:
    """Tries again while storage fails in a way that may pass; whatever a client raises is an OSError in the end."""
    try:
        return _RETRY.run(str(place), operation)
    except MissingMediaError as error:
        kind = FileNotFoundError if isinstance(error.__cause__, FileNotFoundError) else OSError
        raise kind(str(error)) from error
    except StorageError as error:
        raise OSError(str(error)) from error
