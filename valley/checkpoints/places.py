"""Where checkpoints lie: a folder, or any fsspec URI such as `s3://bucket/run`.

A folder is written in place, and what is written last arrives by rename. An object store knows neither renames nor
folders: there, files are made on this machine's disk and uploaded, and an object is seen once all of it is there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from upath import UPath

from valley.errors import SettingsError

Place: TypeAlias = Path | UPath
"""A folder or file: `Path` on a file system of this machine, `UPath` elsewhere. Both read as a path does."""

_LOCAL = ("file", "local")


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

    The temporary copies of a remote folder lie below `$TMPDIR`.
    """
    if isinstance(folder, Path):
        folder.mkdir()
        yield folder
        sync_tree(folder)
        return
    with tempfile.TemporaryDirectory(prefix="valley-checkpoint-") as temporary:
        filled = Path(temporary)
        yield filled
        for file in files_below(filled):
            target = folder / file.relative_to(filled).as_posix()
            with _errors_told(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.fs.put_file(str(file), target.path)


@contextmanager
def on_disk(file: Place) -> Iterator[Path]:
    """Gives the file itself, or a copy of the same name that lasts as long as the block."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="valley-checkpoint-") as temporary:
        copy = Path(temporary) / file.name
        with _errors_told(file):
            file.fs.get_file(file.path, str(copy))
        yield copy


def write_whole(file: Place, text: str) -> None:
    """Writes a text file: it is the old one or the new one, never part of one."""
    if isinstance(file, Path):
        partial = file.with_name(f".{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.rename(file)
        sync(file.parent)
    else:
        with _errors_told(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.fs.pipe_file(file.path, text.encode())


def read_range(file: Place, begin: int, end: int) -> bytes:
    """Returns the bytes of a file from `begin` to before `end`, without fetching the others."""
    if isinstance(file, Path):
        with file.open("rb") as source:
            source.seek(begin)
            return source.read(end - begin)
    with _errors_told(file):
        content: bytes = file.fs.cat_file(file.path, start=begin, end=end)
    return content


def files_below(folder: Path) -> list[Path]:
    """Returns all files below a folder, sorted by path."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def remove(folder: Place) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if isinstance(folder, Path):
        if folder.exists():
            shutil.rmtree(folder)
        return
    with _errors_told(folder):
        if folder.fs.exists(folder.path):
            folder.fs.rm(folder.path, recursive=True)


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


@contextmanager
def _errors_told(place: UPath) -> Iterator[None]:
    """Makes an OSError of whatever a store's client raises: each has exceptions of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{place}: {type(error).__name__}: {error}") from error
