"""Tokens of clips on disk: shards that are appended to, and an index that says what of them counts.

    store.json            the header: the tower and how its tokens are kept
    <name>.tokens         the tokens of some files, one after the other
    <name>.parquet        its index, a row a file, written last and by rename: a shard without one does not count

A row is found by the content of the file it was made of and by its sampling, never by a name. As hashing a file means
reading it, the index also knows the stamps (path, size, time of change) that files had when they were encoded: one that
still bears its stamp is not read again. Whatever changed its stamp is hashed, and not found if its content changed.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, UInt16, UInt64
from pydantic import ValidationError
from torch import Tensor

from valley.data.storage import StoredFile
from valley.data.writing import write_text
from valley.errors import SettingsError
from valley.features.identity import FORMAT, StoreHeader
from valley.features.packing import pack, packed_bytes, unpack
from valley.media.sampling import Sampling

HEADER_FILE = "store.json"
_KEY_BYTES = 16
_ABANDONED_S = 3600.0
"""Age of a shard without an index after which nobody is writing it."""
_CHUNK_BYTES = 1 << 20

_INDEX = pa.schema(
    [
        ("key", pa.binary(_KEY_BYTES)),
        ("stamp", pa.binary(_KEY_BYTES)),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("num_frames", pa.int32()),
        ("notes", pa.list_(pa.string())),
    ]
)


def key_of(content: Path | bytes, sampling: Sampling) -> bytes:
    """Returns what a clip's tokens are found by: a hash of the file's bytes and of how frames are chosen.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = hashlib.blake2b(sampling.model_dump_json().encode() + b"\n", digest_size=_KEY_BYTES)
    if isinstance(content, bytes):
        hasher.update(content)
    else:
        with content.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                hasher.update(chunk)
    return hasher.digest()


def stamp_of(file: StoredFile, sampling: Sampling) -> bytes | None:
    """Returns what stays the same as long as nobody writes to the file; None where storage does not tell."""
    if file.size_bytes is None or file.modified is None:
        return None
    text = f"{file.address}\n{file.size_bytes}\n{file.modified}\n{sampling.model_dump_json()}"
    return hashlib.blake2b(text.encode(), digest_size=_KEY_BYTES).digest()


@dataclass(frozen=True)
class Encoded:
    """A clip in a store.

    Attributes:
        tokens: the bits of bf16 tokens of each frame, the global one first.
        notes: what was odd about its file when it was decoded.
    """

    tokens: UInt16[np.ndarray, "T N D"]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NewClip:
    """A clip to be written.

    Attributes:
        key: see `key_of`.
        stamp: see `stamp_of`.
        path: its file, for people.
        tokens: of each frame, the global one first.
        notes: what was odd about the file.
    """

    key: bytes
    stamp: bytes | None
    path: str
    tokens: Float[Tensor, "T N D"]
    notes: tuple[str, ...] = ()


def write_shard(folder: Path, header: StoreHeader, clips: Sequence[NewClip]) -> None:
    """Adds clips to a store, all of them or, when it is killed, none; any number of processes may do so at once."""
    if not clips:
        return
    name, rows, offset = uuid.uuid4().hex, [], 0
    with (folder / f"{name}.tokens").open("xb") as shard:
        for clip in clips:
            rows.append(
                {
                    "key": clip.key,
                    "stamp": clip.stamp,
                    "path": clip.path,
                    "offset": offset,
                    "num_frames": len(clip.tokens),
                    "notes": list(clip.notes),
                }
            )
            offset += shard.write(pack(clip.tokens, header))
        shard.flush()
        os.fsync(shard.fileno())
    index = folder / f"{name}.parquet"
    unfinished = index.with_name(f".{index.name}")
    with unfinished.open("wb") as file:
        pq.write_table(pa.Table.from_pylist(rows, _INDEX), file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(index)


class FeatureStore:
    """Reads a store; what was written to it after it was opened is not seen. Travels between processes.

    Args:
        folder: the store.

    Raises:
        SettingsError: there is no store that can be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.header = folder, read_header(folder)
        self._shards = sorted(path.stem for path in folder.glob("*.tokens") if path.with_suffix(".parquet").exists())
        tables = [pq.read_table(folder / f"{name}.parquet", schema=_INDEX) for name in self._shards]
        self._shard = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        index = pa.concat_tables(tables) if tables else _INDEX.empty_table()
        self._offset, self._num_frames = index["offset"].to_numpy(), index["num_frames"].to_numpy()
        self._notes = {row: tuple(notes) for row, notes in enumerate(index["notes"].to_pylist()) if notes}
        self._maps: dict[int, np.memmap[Any, np.dtype[np.uint8]]] = {}
        self._keys, self._stamps = _Lookup(index["key"].to_pylist()), _Lookup(index["stamp"].to_pylist())

    def __len__(self) -> int:
        return len(self._offset)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_maps": {}}

    def find(self, key: bytes) -> int | None:
        """Returns the row of a clip, by `key_of`."""
        return self._keys.find(key)

    def find_unread(self, stamp: bytes | None) -> int | None:
        """Returns the row of a file that still bears its stamp, by `stamp_of`."""
        return None if stamp is None else self._stamps.find(stamp)

    def num_frames(self, row: int) -> int:
        """Returns how many frames a clip has."""
        return int(self._num_frames[row])

    def read(self, row: int) -> Encoded:
        """Returns a clip."""
        num_frames, offset = self.num_frames(row), int(self._offset[row])
        packed: Any = self._map(int(self._shard[row]))[offset : offset + packed_bytes(num_frames, self.header)]
        return Encoded(unpack(memoryview(packed), num_frames, self.header), self._notes.get(row, ()))

    def _map(self, shard: int) -> np.memmap[Any, np.dtype[np.uint8]]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / f"{self._shards[shard]}.tokens", np.uint8, mode="r")
        return self._maps[shard]


class _Lookup:
    """Rows by 16-byte keys, some of which are None; a million of them take 24 MB."""

    def __init__(self, keys: Sequence[bytes | None]) -> None:
        rows = [row for row, key in enumerate(keys) if key is not None]
        words = np.frombuffer(b"".join(key for key in keys if key is not None), "<u8").reshape(-1, 2)
        order = np.argsort(words[:, 0], kind="stable")
        self._words: UInt64[np.ndarray, "rows 2"] = words[order]
        self._rows = np.asarray(rows, np.int64)[order]

    def find(self, key: bytes) -> int | None:
        first, second = np.frombuffer(key, "<u8")
        place = int(np.searchsorted(self._words[:, 0], first))
        while place < len(self._rows) and self._words[place, 0] == first:
            if self._words[place, 1] == second:
                return int(self._rows[place])
            place += 1
        return None


def open_store(folder: Path, header: StoreHeader) -> FeatureStore:
    """Makes a store, or opens one of the same header to go on with it.

    What a killed writer left counts for nothing; it is cleared away when it is so old that nobody is writing it.

    Raises:
        SettingsError: the folder holds another store, or something else.
    """
    if (folder / HEADER_FILE).exists():
        if problems := header_problems(read_header(folder), header):
            raise SettingsError([f"features: {folder} was made otherwise: {problem}" for problem in problems])
    elif folder.exists() and any(folder.iterdir()):
        raise SettingsError([f"features: {folder} holds files, but no {HEADER_FILE}"])
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HEADER_FILE, header.model_dump_json(indent=1) + "\n")
    old_s = time.time() - _ABANDONED_S
    for path in _unfinished(folder):
        with suppress(FileNotFoundError):  # just completed, or cleared away by another job
            if path.stat().st_mtime < old_s:
                path.unlink()
    return FeatureStore(folder)


def _unfinished(folder: Path) -> Iterator[Path]:
    yield from folder.glob(".*.parquet")
    yield from (path for path in folder.glob("*.tokens") if not path.with_suffix(".parquet").exists())


def read_header(folder: Path) -> StoreHeader:
    """Returns what a store says of itself.

    Raises:
        SettingsError: there is no store, or one of another format.
    """
    try:
        header = StoreHeader.model_validate_json((folder / HEADER_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError([f"{folder}: no feature store: it has no {HEADER_FILE}"]) from None
    except ValidationError as error:
        raise SettingsError([f"{folder / HEADER_FILE}: not a feature store's header: {error}"]) from None
    if header.format != FORMAT:
        raise SettingsError([f"{folder}: a feature store of format {header.format}; this is {FORMAT}"])
    return header


def header_problems(found: StoreHeader, wanted: StoreHeader) -> list[str]:
    """One line for each thing about a store that is not as wanted."""
    problems = found.tower.differences(wanted.tower)
    for name in ("precision", "pooled"):
        if getattr(found, name) != getattr(wanted, name):
            problems.append(f"{name}: {getattr(found, name)}, not {getattr(wanted, name)}")
    return problems
