"""The raw records of a data file: a JSON array, JSON Lines or Parquet, local or behind any fsspec URI.

Written for files of a million records: the file is mapped, not loaded, and its records are decoded one at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import fsspec
import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from valley.data.storage import Retry, connect, is_uri
from valley.errors import MissingMediaError, RecordError

T = TypeVar("T")

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_BOM = b"\xef\xbb\xbf"
_SPACE = " \t\r\n"
_TOO_DEEP = "nested too deeply"
_LINES_BEFORE_DOUBT = 100  # a file of which no line so far holds a record is not JSON Lines


class DataFileError(Exception):
    """A data file cannot be read at all; the caller knows which setting names it."""


def digest(path: str) -> str:
    """A fingerprint of a data file's content; of its version as the remote states it, when it is remote.

    Raises:
        DataFileError: there is no such file.
        StorageError: storage failed on every try.
    """
    if is_uri(path):
        filesystem, address = connect(path)
        return str(_read_patiently(path, lambda: filesystem.ukey(address)))
    if Path(path).is_dir():
        raise DataFileError("a folder, not a file")
    return _read_patiently(path, lambda: _hash_file(path))


@contextlib.contextmanager
def open_records(path: str, scratch: Path) -> Iterator[Iterator[object]]:
    """Opens a data file and gives an iterator over its raw records.

    A record that is not JSON comes as a `RecordError`, a value like the others.

    Args:
        path: the data file, `.parquet` or JSON, perhaps compressed.
        scratch: an existing folder for a copy of what cannot be mapped where it is.

    Raises:
        DataFileError: it is neither JSON nor Parquet; while iterating, too.
        StorageError: storage failed on every try.
    """
    if not is_uri(path) and not path.endswith(_COMPRESSED):
        yield _iterate(Path(path))
        return
    copy = scratch / Path(path.rpartition("::")[-1]).name
    _read_patiently(path, lambda: _copy(path, copy))
    try:
        yield _iterate(copy)
    finally:
        copy.unlink()


def _read_patiently(path: str, operation: Callable[[], T]) -> T:
    try:
        return Retry().run(path, operation)
    except MissingMediaError as error:
        raise DataFileError(error.reason) from None


def _hash_file(path: str) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _copy(path: str, copy: Path) -> None:
    with fsspec.open(path, "rb", compression="infer") as source, copy.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)


def _iterate(path: Path) -> Iterator[object]:
    return _iterate_parquet(path) if ".parquet" in path.suffixes else _iterate_json(path)


def _iterate_parquet(path: Path) -> Iterator[object]:
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the storage's; Arrow's own findings about the content have no number
        raise DataFileError(f"not Parquet, or corrupt: {error}") from None


def _iterate_json(path: Path) -> Iterator[object]:
    with path.open("rb") as stream:
        if not stream.seek(0, 2):
            raise DataFileError("the file is empty")
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    start = len(_BOM) if content[: len(_BOM)] == _BOM else 0
    while start < len(content) and content[start] in _SPACE.encode():
        start += 1
    if content[start : start + 1] == b"[":
        yield from _iterate_array(content, start)
    else:
        yield from _iterate_lines(content, start)


def _iterate_array(content: mmap.mmap, start: int) -> Iterator[object]:
    try:
        # Raw values are views into the map: the array is checked and cut up in one pass, and nothing of it is copied.
        elements = msgspec.json.decode(memoryview(content)[start:], type=list[msgspec.Raw])
    except msgspec.DecodeError:
        yield from _iterate_lenient(content[start:])
        return
    except RecursionError:  # where the record ends that is nested so deeply, only a pass over it could tell
        raise DataFileError(f"a record of the array is {_TOO_DEEP}; as JSON Lines it alone would be rejected") from None
    for position, element in enumerate(elements):
        yield _decode(element, position)


def _iterate_lenient(content: bytes) -> Iterator[object]:
    """The elements of an array with what Python writes though JSON forbids it: NaN, halves of surrogate pairs."""
    decoder = json.JSONDecoder()
    try:
        text = content.decode()
        at = _skip_space(text, 1)
        while text[at : at + 1] != "]":
            element, at = decoder.raw_decode(text, at)
            yield element
            at = _skip_space(text, at)
            if text[at : at + 1] == ",":
                at = _skip_space(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, at)
    except ValueError as error:
        raise DataFileError(f"not JSON: {error}") from None
    except RecursionError:
        raise DataFileError(f"a record of the array is {_TOO_DEEP}; as JSON Lines it alone would be rejected") from None


def _skip_space(text: str, at: int) -> int:
    while text[at : at + 1] in _SPACE and at < len(text):
        at += 1
    return at


def _iterate_lines(content: mmap.mmap, start: int) -> Iterator[object]:
    content.seek(start)
    num_lines = num_records = 0
    while line := content.readline():
        if line.isspace():
            continue
        value = _decode(line, num_lines)
        num_lines += 1
        num_records += isinstance(value, dict)
        if num_records == 0 and num_lines >= _LINES_BEFORE_DOUBT:
            break
        yield value
    if num_records == 0:
        raise DataFileError("neither a JSON array nor JSON Lines: no line in it is a JSON object")


def _decode(raw: msgspec.Raw | bytes, position: int) -> object:
    try:
        return msgspec.json.decode(raw)
    except ValueError:
        pass
    except RecursionError:
        return RecordError(f"#{position}", "record", _TOO_DEEP)
    try:
        return json.loads(bytes(raw))
    except ValueError as error:
        return RecordError(f"#{position}", "record", f"not JSON: {error}")
    except RecursionError:
        return RecordError(f"#{position}", "record", _TOO_DEEP)
