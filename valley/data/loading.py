"""From a slot to a sample: the record's media are read, decoded and resized, its dialogue tokenised.

This is the whole work of a data worker, in one plain object without Ray. Bad samples do not leave it as exceptions: a
slot whose sample cannot be used is refilled from the same source, and what was rejected goes along with the sample.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer, UInt8, UInt16

from valley.data.collate import Sample, Timings, make_filler
from valley.data.estimate import most_frames
from valley.data.manifest import Manifest
from valley.data.order import EMPTY, EpochOrder
from valley.data.records import Media, Message, Record
from valley.data.rejects import KnownRejects, Reject, Stage
from valley.data.settings import DataSettings
from valley.data.storage import Retry, Root, StoredFile
from valley.errors import MediaError, RecordError, UnsupportedMediaError
from valley.media.decode import Interpolation, ResizeMode, sample_clip
from valley.media.sampling import Sampling

MAX_REFILLS = 3
"""Rows tried in a slot after its own."""
_READING_FORMAT = 2
"""Raised whenever Valley's own way of reading files comes to reject others."""


@runtime_checkable
class Encoded(Protocol):
    """A tokenised dialogue."""

    @property
    def input_ids(self) -> Integer[np.ndarray, " L"]:
        """Its tokens."""

    @property
    def labels(self) -> Integer[np.ndarray, " L"]:
        """The tokens where supervised, -100 elsewhere."""

    @property
    def cut_tokens(self) -> int:
        """Tokens cut off its end."""


@runtime_checkable
class Encoder(Protocol):
    """Turns a dialogue into tokens; the model's processor in a run."""

    def encode(self, messages: Sequence[Message], num_frames: Sequence[int], *, max_tokens: int | None) -> Encoded:
        """Tokenises chat messages whose media, in order, have `num_frames` frames.

        Raises:
            RecordError: nothing of it is supervised, or media and messages do not agree.
        """


@dataclass(frozen=True, slots=True)
class Clip:
    """What a file gives.

    Attributes:
        frames: pictures, or the bits of the bf16 tokens that the tower has made of them.
        notes: what is odd about the file.
    """

    frames: UInt8[np.ndarray, "T S S 3"] | UInt16[np.ndarray, "T N D"]
    notes: tuple[str, ...] = ()


@runtime_checkable
class Features(Protocol):
    """The tower's tokens of files, kept by an earlier job; `valley.features.reading.StoredFeatures` in a run."""

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Tokens and width of a frame, N and D."""

    def find(self, file: StoredFile, sampling: Sampling) -> Clip | None:
        """Returns the clip of a file that was not written to since; None when only its content can tell."""

    def read(self, path: str, content: Path | bytes, sampling: Sampling) -> Clip:
        """Returns the clip of a file by its content.

        Raises:
            MediaError: there is none.
        """


@dataclass(slots=True)
class _Trace:
    """How far one row got, for the reject it may become."""

    stage: Stage = "read"
    path: str = ""
    file: StoredFile | None = None
    earlier: Reject | None = None
    notes: list[str] = field(default_factory=list)


class Loader:
    """Loads slots.

    Args:
        manifest: the records.
        order: which record is in which slot.
        encoder: tokenises.
        settings: how media are read, and the longest sample.
        size_px: side of the tower's pictures.
        interpolation: filter that frames are resized with.
        resize_mode: how frames are brought to a square.
        known: files that an earlier run rejected.
        retry: patience with storage; `settings.retries` with the usual waits when None.
        features: takes the place of decoding.
    """

    def __init__(
        self,
        manifest: Manifest,
        order: EpochOrder,
        encoder: Encoder,
        settings: DataSettings,
        *,
        size_px: int,
        interpolation: Interpolation,
        resize_mode: ResizeMode,
        known: KnownRejects | None = None,
        retry: Retry | None = None,
        features: Features | None = None,
    ) -> None:
        self.manifest, self.order, self.encoder, self.settings = manifest, order, encoder, settings
        self.size_px, self.interpolation, self.resize_mode = size_px, interpolation, resize_mode
        self.known = known or KnownRejects()
        self.retry = retry or Retry(settings.retries)
        self.features = features
        self._roots = [
            Root(source.root, retry=self.retry, max_bytes=min(settings.max_remote_bytes, settings.limits.max_bytes))
            for source in manifest.sources
        ]

    @property
    def no_frames(self) -> UInt8[np.ndarray, "0 S S 3"] | UInt16[np.ndarray, "0 N D"]:
        """The frames of a sample without media."""
        if self.features:
            return np.zeros((0, *self.features.frame_shape), dtype=np.uint16)
        return np.zeros((0, self.size_px, self.size_px, 3), dtype=np.uint8)

    @property
    def frame_bytes(self) -> int:
        """Size of one frame as samples hold it."""
        none = self.no_frames
        return none.itemsize * math.prod(none.shape[1:])

    def load(self, slot: int) -> Sample:
        """The sample in a slot, with the rejects met on the way to it.

        A rejected sample is replaced by up to three others of its source; then, and for `EMPTY`, the slot is filled by
        a sample of weight 0.

        Raises:
            StorageError: storage failed on every try.
        """
        timings = Timings()
        rejects: list[Reject] = []
        for row in self._candidates(slot):
            outcome = self._load_row(slot, row, timings)
            if isinstance(outcome, Sample):
                return replace(outcome, rejects=tuple(rejects))
            rejects.append(outcome)
        return make_filler(slot, self.no_frames, rejects=tuple(rejects), timings=timings)

    def _candidates(self, slot: int) -> Iterator[int]:
        row = self.order.row(slot)
        if row == EMPTY:
            return
        yield row
        for attempt in range(1, MAX_REFILLS + 1):
            refill = self.order.refill(slot, attempt)
            if refill is None:
                return
            yield refill

    def _load_row(self, slot: int, row: int, timings: Timings) -> Sample | Reject:
        record, source = self.manifest.record(row), self.manifest.source_of(row)
        record = record.without_media() if self.settings.blind else record
        started_s = time.perf_counter()
        trace = _Trace()
        try:
            clips = [self._read_medium(medium, source, trace, timings) for medium in record.media]
            trace.stage, trace.path, trace.file = "encode", self.manifest.sources[source].path, None
            encoded = self._encode(record, [len(clip) for clip in clips], timings)
        except (MediaError, RecordError) as error:
            return Reject(
                slot=slot,
                sample_id=record.id,
                source=record.source,
                path=trace.path,
                stage=trace.stage,
                error=trace.earlier.error if trace.earlier else type(error).__name__,
                reason=error.reason,
                seconds=time.perf_counter() - started_s,
                size_bytes=trace.file.size_bytes if trace.file else None,
                modified=trace.file.modified if trace.file else None,
            )
        return Sample(
            slot=slot,
            row=row,
            sample_id=record.id,
            source=source,
            input_ids=np.asarray(encoded.input_ids, dtype=np.int64),
            labels=np.asarray(encoded.labels, dtype=np.int64),
            frames=np.concatenate(clips) if clips else self.no_frames,
            num_frames=np.array([len(clip) for clip in clips], dtype=np.int64),
            cut_tokens=encoded.cut_tokens,
            notes=tuple(trace.notes),
            timings=timings,
        )

    def _read_medium(
        self, medium: Media, source: int, trace: _Trace, timings: Timings
    ) -> UInt8[np.ndarray, "T S S 3"] | UInt16[np.ndarray, "T N D"]:
        sampling = self.manifest.sources[source].sampling
        if len(medium.paths) == 1:
            return self._read_file(medium.candidates(medium.paths[0]), source, sampling, trace, timings)
        pictures = []
        for path in picked_paths(medium, sampling):
            picture = self._read_file(medium.candidates(path), source, sampling, trace, timings)
            if len(picture) != 1:
                raise UnsupportedMediaError(trace.path, "a video among the pictures of a clip")
            pictures.append(picture)
        return np.concatenate(pictures)

    def _read_file(
        self, candidates: Sequence[str], source: int, sampling: Sampling, trace: _Trace, timings: Timings
    ) -> UInt8[np.ndarray, "T S S 3"] | UInt16[np.ndarray, "T N D"]:
        root = self._roots[source]
        started_s = time.perf_counter()
        trace.stage, trace.path, trace.file = "read", root.shown(candidates[0]), None
        try:
            trace.file = file = root.find(candidates)
            trace.path = file.path
            trace.earlier = self.known.find(file.path, file.size_bytes, file.modified)
            if trace.earlier:
                trace.stage = "known"
                raise MediaError(file.path, trace.earlier.reason)
            clip = self.features.find(file, sampling) if self.features else None
            content = root.read(file) if clip is None else None
        finally:
            timings.read_s += time.perf_counter() - started_s
        if content is not None:
            started_s = time.perf_counter()
            trace.stage = "decode"
            try:
                # A local file is opened by the decoder, so its storage may fail there, too.
                clip = self.retry.run(file.path, partial(self._decode, file.path, content, sampling), (OSError,))
            finally:
                timings.decode_s += time.perf_counter() - started_s
        assert clip is not None
        timings.num_frames += len(clip.frames)
        trace.notes += [f"{file.path}: {note}" for note in clip.notes]
        return clip.frames

    def _decode(self, path: str, content: Path | bytes, sampling: Sampling) -> Clip:
        if self.features:
            return self.features.read(path, content, sampling)
        frames = sample_clip(
            content,
            sampling,
            decoder=self.settings.decoder,
            size_px=self.size_px,
            interpolation=self.interpolation,
            resize_mode=self.resize_mode,
            limits=self.settings.limits,
        )
        return Clip(frames.pixels, frames.notes)

    def _encode(self, record: Record, num_frames: list[int], timings: Timings) -> Encoded:
        started_s = time.perf_counter()
        try:
            return self.encoder.encode(record.messages, num_frames, max_tokens=self.settings.max_tokens)
        finally:
            timings.encode_s += time.perf_counter() - started_s


def picked_paths(medium: Media, sampling: Sampling) -> list[str]:
    """The files of a medium that are looked at.

    A clip given as pictures has no times, only an order: it is thinned as frames are.
    """
    count = len(medium.paths)
    if count == 1:
        return list(medium.paths)
    chosen = np.round(np.linspace(0, count - 1, min(most_frames(sampling), count))).astype(int)
    return [medium.paths[index] for index in chosen]


def reading_policy(settings: DataSettings, versions: Mapping[str, str] | None = None) -> str:
    """A fingerprint of how files are read: what one policy rejects, another may take.

    Args:
        settings: decoder and limits.
        versions: of the decoding libraries, by distribution; None: those installed here.
    """
    versions = decoder_versions(settings.decoder) if versions is None else versions
    policy = f"{_READING_FORMAT} {settings.decoder} {sorted(versions.items())} {settings.limits.model_dump_json()}"
    return hashlib.blake2b(policy.encode(), digest_size=8).hexdigest()


def decoder_versions(decoder: str) -> dict[str, str]:
    """Versions of the libraries that may read a file: the decoder's, Pillow for stills, PyAV for what others refuse."""
    distributions = {"av", "pillow", decoder} - {"auto", "pyav"}
    return {name: metadata.version(name) for name in distributions if _is_installed(name)}


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
