"""The manifest: all sources' records, normalised once into a memory-mapped Arrow file that tasks read by row number.

A manifest is a folder named by the fingerprint of what it was made from (the data files' content, their settings), so
it is found again as long as nothing changed and made anew when something did:

    records.arrow     a row per record: id, source, turns, media, estimates of its length
    rejects.parquet   the records that could not be used, with the reason
    manifest.json     the header: sources, counts, content hash

It is written under another name and renamed when complete: a manifest is there whole or not at all.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64, Integer, UInt64

from valley.config import Settings
from valley.data.datafile import DataFileError, digest, open_records
from valley.data.estimate import FrameEstimator, text_tokens
from valley.data.records import Media, Record, Turn, parse_record
from valley.data.rejects import Reject, read_rejects, write_rejects
from valley.data.settings import SourceSettings
from valley.data.storage import Root
from valley.errors import RecordError, SettingsError
from valley.media.decode import Limits
from valley.media.sampling import Sampling

FORMAT = 1
"""Raised when a manifest of an older kind must not be reused."""
BATCH_ROWS = 4096
_RECORDS_BEFORE_DOUBT = 1000  # a data file none of whose first records can be used is in another format

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.uint16()),
        ("turns", pa.large_string()),
        ("media", pa.large_string()),
        ("num_media", pa.int32()),
        ("num_frames", pa.int32()),
        ("text_tokens", pa.int32()),
        ("media_keys", pa.list_(pa.uint64())),
    ]
)
_encode = msgspec.json.Encoder().encode
_decode_turns = msgspec.json.Decoder(tuple[Turn, ...]).decode
_decode_media = msgspec.json.Decoder(tuple[Media, ...]).decode


class ManifestSource(Settings):
    """A source as the manifest holds it."""

    name: str
    """Name in tables and metrics, different from all others'."""
    path: str
    """The data file."""
    root: str
    """Folder or URI its media are below."""
    sampling: Sampling
    """How its clips are sampled."""
    num_records: int = 0
    """Rows of it."""
    num_rejected: int = 0
    """Records of it that could not be used."""


class _Header(Settings):
    format: int
    content_hash: str
    sources: list[ManifestSource]


class Manifest:
    """A finished manifest. Pickles as its path.

    Args:
        path: its folder.

    Attributes:
        path: its folder.
        sources: what it was made from, in the order of the settings.
        content_hash: of all rows; equal hashes mean equal rows in equal order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _Header.model_validate_json((path / "manifest.json").read_bytes())
        self.sources, self.content_hash = tuple(header.sources), header.content_hash
        reader = pa.ipc.open_file(pa.memory_map(str(path / "records.arrow")))
        self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        self._starts = [0, *itertools.accumulate(len(batch) for batch in self._batches)]

    @classmethod
    def open(cls, path: str | Path) -> Manifest:
        """Opens the manifest in a folder."""
        return cls(Path(path))

    def __reduce__(self) -> tuple[Callable[[Path], Manifest], tuple[Path]]:
        return Manifest, (self.path,)

    def __len__(self) -> int:
        return self._starts[-1]

    def record(self, row: int) -> Record:
        """The record in a row."""
        batch, index = self._locate(row)
        sample_id, source, turns, media = (batch.column(column)[index].as_py() for column in range(4))
        return Record(sample_id, self.sources[source].name, _decode_turns(turns), _decode_media(media))

    def source_of(self, row: int) -> int:
        """The index in `sources` of a row's source."""
        batch, index = self._locate(row)
        return int(batch["source"][index].as_py())

    @functools.cached_property
    def row_sources(self) -> Integer[np.ndarray, " rows"]:
        """Every row's source."""
        return self._column("source")

    @functools.cached_property
    def num_media(self) -> Integer[np.ndarray, " rows"]:
        """Media of every row."""
        return self._column("num_media")

    @functools.cached_property
    def num_frames(self) -> Integer[np.ndarray, " rows"]:
        """Frames of every row, all media together, estimated."""
        return self._column("num_frames")

    @functools.cached_property
    def text_tokens(self) -> Integer[np.ndarray, " rows"]:
        """Tokens of every row's text, estimated."""
        return self._column("text_tokens")

    def lengths(self, num_patches: int) -> Integer[np.ndarray, " rows"]:
        """Tokens of every row, estimated: text, and P patches, T frames and four marks for every medium."""
        marks = self.num_media * (num_patches + 4)
        return np.asarray(self.text_tokens + self.num_frames + marks)

    def media_keys(self) -> tuple[Int64[np.ndarray, " media"], UInt64[np.ndarray, " media"]]:
        """What tells media apart, for splits: every medium's row and key. A row without media has one, of its text."""
        lists = pa.chunked_array([batch["media_keys"] for batch in self._batches])
        counts = pc.list_value_length(lists).to_numpy()
        return np.repeat(np.arange(len(self)), counts), pc.list_flatten(lists).to_numpy()

    def rejects(self) -> list[Reject]:
        """The records that could not be used."""
        return read_rejects(self.path / "rejects.parquet")

    def _locate(self, row: int) -> tuple[pa.RecordBatch, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a manifest of {len(self)}")
        batch = bisect.bisect_right(self._starts, row) - 1
        return self._batches[batch], row - self._starts[batch]

    def _column(self, name: str) -> Integer[np.ndarray, " rows"]:
        return np.concatenate([batch[name].to_numpy() for batch in self._batches])


def build_manifest(
    sources: Sequence[SourceSettings],
    folder: Path,
    *,
    sampling: Sampling,
    limits: Limits | None = None,
    max_probes: int = 512,
    setting: str = "data.sources",
) -> Manifest:
    """Makes the manifest of some sources, or finds it already made.

    Args:
        sources: the data files and their roots.
        folder: where manifests are kept.
        sampling: of sources that do not have their own.
        limits: what probing a file may cost.
        max_probes: local videos of each source whose headers are read to estimate frames.
        setting: dotted path of `sources`, for messages.

    Raises:
        SettingsError: a data file or root is not there, is not what it should be, or holds no usable record.
        StorageError: storage failed on every try.
    """
    plan = _plan(sources, sampling)
    target = folder / _fingerprint(plan, max_probes, setting)
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as scratch:
            making = Path(scratch, "manifest")
            making.mkdir()
            _Writer(making, limits or Limits(), max_probes).write(plan, setting)
            _move(making, target)
    return Manifest(target)


def differing_sampling(sources: Sequence[SourceSettings], sampling: Sampling) -> dict[str, Sampling]:
    """Returns the sampling of the sources that have another one than `sampling`, by their names in tables."""
    return {source.name: source.sampling for source in _plan(sources, sampling) if source.sampling != sampling}


def _plan(sources: Sequence[SourceSettings], sampling: Sampling) -> list[ManifestSource]:
    plan: list[ManifestSource] = []
    for source in sources:
        base = source.name or Path(source.path).name.split(".")[0]
        names = itertools.chain([base], (f"{base}-{number}" for number in itertools.count(2)))
        name = next(name for name in names if name not in {other.name for other in plan})
        root = source.root or source.path.rpartition("/")[0] or "/"
        plan.append(ManifestSource(name=name, path=source.path, root=root, sampling=source.sampling or sampling))
    return plan


def _fingerprint(plan: Sequence[ManifestSource], max_probes: int, setting: str) -> str:
    problems: list[str] = []
    hasher = hashlib.blake2b(f"{FORMAT} {max_probes}".encode(), digest_size=12)
    for index, source in enumerate(plan):
        try:
            hasher.update(f"{source.model_dump_json()} {digest(source.path)}".encode())
        except (DataFileError, SettingsError) as error:
            problems.append(f"{setting}.{index}.path: {source.path}: {error}")
        try:
            root = Root(source.root)
            if root.is_local and not Path(root.location).is_dir():
                problems.append(f"{setting}.{index}.root: {source.root}: no such folder")
        except SettingsError as error:
            problems.append(f"{setting}.{index}.root: {error}")
    if problems:
        raise SettingsError(problems)
    return hasher.hexdigest()


def _move(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:
        if not target.exists():  # else another process has just made the same
            raise


class _Writer:
    """Writes a manifest's files into a folder, a batch of rows at a time."""

    def __init__(self, folder: Path, limits: Limits, max_probes: int) -> None:
        self._folder, self._limits, self._max_probes = folder, limits, max_probes
        self._hasher = hashlib.blake2b(digest_size=16)
        self._rejects: list[Reject] = []

    def write(self, plan: Sequence[ManifestSource], setting: str) -> None:
        """Writes all sources and, last, the header."""
        sources: list[ManifestSource] = []
        with pa.OSFile(str(self._folder / "records.arrow"), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as arrow:
            for index, source in enumerate(plan):
                try:
                    num_records, num_rejected = self._write_source(index, source, arrow)
                except DataFileError as error:
                    raise SettingsError([f"{setting}.{index}.path: {source.path}: {error}"]) from None
                counts = {"num_records": num_records, "num_rejected": num_rejected}
                sources.append(source.model_copy(update=counts))
        write_rejects(self._rejects, self._folder / "rejects.parquet")
        header = _Header(format=FORMAT, content_hash=self._hasher.hexdigest(), sources=sources)
        (self._folder / "manifest.json").write_text(header.model_dump_json(indent=2))

    def _write_source(self, index: int, source: ManifestSource, arrow: pa.ipc.RecordBatchFileWriter) -> tuple[int, int]:
        root = Root(source.root)
        frames = FrameEstimator(root, source.sampling, self._limits, max_probes=self._max_probes)
        num_records, num_before = 0, len(self._rejects)
        records = self._parse(source)
        while batch := list(itertools.islice(records, BATCH_ROWS)):
            arrow.write_batch(self._to_batch(index, root, batch, frames.num_frames([record.media for record in batch])))
            num_records += len(batch)
        num_rejected = len(self._rejects) - num_before
        if not num_records:
            if not num_rejected:
                raise DataFileError("there is no record in it")
            reason = self._rejects[num_before].reason
            raise DataFileError(f"none of the first {num_rejected} records can be used; of the first: {reason}")
        return num_records, num_rejected

    def _parse(self, source: ManifestSource) -> Iterator[Record]:
        num_good = 0
        with open_records(source.path, self._folder) as raw_records:
            for position, raw in enumerate(raw_records):
                try:
                    if isinstance(raw, RecordError):
                        raise raw
                    yield parse_record(raw, position, source.name)
                    num_good += 1
                except RecordError as error:
                    reason = f"{error.field}: {error.reason}"
                    reject = Reject(
                        None, error.sample_id, source.name, source.path, "parse", "RecordError", reason, 0.0
                    )
                    self._rejects.append(reject)
                    if not num_good and position >= _RECORDS_BEFORE_DOUBT:
                        return

    def _to_batch(self, source: int, root: Root, records: list[Record], num_frames: list[int]) -> pa.RecordBatch:
        ids = [record.id for record in records]
        turns = [_encode(record.turns) for record in records]
        media = [_encode(record.media) for record in records]
        keys = [_media_keys(root, record, json) for record, json in zip(records, turns, strict=True)]
        self._hasher.update(_encode((source, ids, num_frames)) + b"".join(turns) + b"".join(media))
        columns = {
            "id": ids,
            "source": [source] * len(records),
            "turns": turns,
            "media": media,
            "num_media": [len(record.media) for record in records],
            "num_frames": num_frames,
            "text_tokens": [text_tokens(json) for json in turns],
            "media_keys": keys,
        }
        return pa.RecordBatch.from_pydict(columns, schema=_SCHEMA)


def _media_keys(root: Root, record: Record, turns_json: bytes) -> list[int]:
    names = [root.shown(path.removesuffix(".mp4")).encode() for medium in record.media for path in medium.paths]
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names or [turns_json])
    return [int.from_bytes(digest, "little") for digest in digests]
