"""Filling a store: which files there are, their frames, and the tower's tokens of them.

Two steps, so that they can run on different machines: `Reader` finds, reads and decodes (CPUs), `Encoder` runs the
tower and writes (GPUs, or CPUs). What the store has already is neither decoded nor encoded again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from valley.data.loading import picked_paths
from valley.data.manifest import Manifest
from valley.data.rejects import Reject
from valley.data.settings import DataSettings
from valley.data.storage import Retry, Root
from valley.errors import MediaError
from valley.features.identity import StoreHeader, TowerIdentity
from valley.features.packing import packed_bytes
from valley.features.store import FeatureStore, NewClip, key_of, stamp_of, write_shard
from valley.media.decode import Frames, sample_clip
from valley.media.sampling import Sampling
from valley.model.vision import VisionTower


class Task(NamedTuple):
    """A file to be encoded.

    Attributes:
        root: folder or URI it is below.
        candidates: where it may be, most likely first.
        sampling: how its frames are chosen.
        sample_id: the first record that has it.
        source: the name of that record's source.
    """

    root: str
    candidates: tuple[str, ...]
    sampling: Sampling
    sample_id: str
    source: str


def list_tasks(manifests: Iterable[Manifest]) -> Iterator[Task]:
    """Yields every file that the records of some manifests look at, each once."""
    seen: set[tuple[str, tuple[str, ...], str]] = set()
    for manifest in manifests:
        for row in range(len(manifest)):
            source, record = manifest.sources[manifest.source_of(row)], manifest.record(row)
            for medium in record.media:
                for path in picked_paths(medium, source.sampling):
                    candidates = tuple(medium.candidates(path))
                    task = (source.root, candidates, source.sampling.model_dump_json())
                    if task not in seen:
                        seen.add(task)
                        yield Task(source.root, candidates, source.sampling, record.id, source.name)


@dataclass(frozen=True)
class Estimate:
    """What filling a store will take, from metadata alone.

    Attributes:
        num_files: files, those in the store already included.
        num_frames: frames of them, estimated.
        num_bytes: of the store when it is full.
        tower_s: time that the tower of one worker needs.
    """

    num_files: int
    num_frames: int
    num_bytes: int
    tower_s: float

    def __str__(self) -> str:
        hours, rest = divmod(round(self.tower_s), 3600)
        return (
            f"{self.num_files:,} files, about {self.num_frames:,} frames: {self.num_bytes / 2**30:.2f} GiB, and "
            f"{hours}:{rest // 60:02d}:{rest % 60:02d} of one tower's time"
        )


def estimate(manifests: Sequence[Manifest], num_files: int, header: StoreHeader, seconds_per_frame: float) -> Estimate:
    """Returns what filling a store will take.

    Args:
        manifests: the records.
        num_files: files that they look at.
        header: of the store.
        seconds_per_frame: of the tower.
    """
    frames = sum(int(manifest.num_frames.sum()) for manifest in manifests)
    media = sum(int(manifest.num_media.sum()) for manifest in manifests)
    num_frames = round(num_files * frames / media) if media else 0
    first = packed_bytes(1, header)
    num_bytes = num_files * first + max(num_frames - num_files, 0) * (packed_bytes(2, header) - first)
    return Estimate(num_files, num_frames, num_bytes, num_frames * seconds_per_frame)


def seconds_per_frame(tower: VisionTower, device: torch.device) -> float:
    """Measures a tower on one of its micro-batches of blank frames."""
    size_px = tower.config.size_px
    frames = torch.zeros(tower.config.micro_batch, size_px, size_px, 3, dtype=torch.uint8, device=device)
    tower(frames[:1]).cpu()
    started_s = time.perf_counter()
    tower(frames).cpu()
    return (time.perf_counter() - started_s) / len(frames)


@dataclass(frozen=True)
class Pictures:
    """A file's frames, on their way to the tower.

    Attributes:
        key: see `valley.features.store.key_of`.
        stamp: see `valley.features.store.stamp_of`.
        path: the file.
        frames: as the tower takes them before normalising.
        notes: what is odd about the file.
    """

    key: bytes
    stamp: bytes | None
    path: str
    frames: UInt8[np.ndarray, "T S S 3"]
    notes: tuple[str, ...]


class Reader:
    """Finds, reads and decodes files that a store lacks.

    Args:
        store: what is there already.
        settings: how files are read.
    """

    def __init__(self, store: FeatureStore, settings: DataSettings) -> None:
        self._store, self._settings = store, settings
        self._retry = Retry(settings.retries)
        self._roots: dict[str, Root] = {}

    def __call__(self, task: Task) -> Pictures | Reject | None:
        """Returns a file's frames, why they cannot be had, or None when the store has their tokens.

        Raises:
            StorageError: storage failed on every try.
        """
        settings, tower = self._settings, self._store.header.tower
        max_bytes = min(settings.max_remote_bytes, settings.limits.max_bytes)
        root = self._roots.setdefault(task.root, Root(task.root, retry=self._retry, max_bytes=max_bytes))
        started_s, path = time.perf_counter(), root.shown(task.candidates[0])
        try:
            file = root.find(task.candidates)
            path, stamp = file.path, stamp_of(file, task.sampling)
            if self._store.find_unread(stamp) is not None:
                return None
            content = root.read(file)
            key = self._retry.run(path, partial(key_of, content, task.sampling), (OSError,))
            if self._store.find(key) is not None:
                return None
            decode = partial(_decode, content, task.sampling, settings, tower)
            clip = self._retry.run(path, decode, (OSError,))
        except MediaError as error:
            seconds = time.perf_counter() - started_s
            name = type(error).__name__
            return Reject(None, task.sample_id, task.source, path, "decode", name, error.reason, seconds)
        return Pictures(key, stamp, path, clip.pixels, clip.notes)


def _decode(content: Path | bytes, sampling: Sampling, settings: DataSettings, tower: TowerIdentity) -> Frames:
    return sample_clip(
        content,
        sampling,
        decoder=settings.decoder,
        size_px=tower.size_px,
        interpolation=tower.interpolation,
        resize_mode=tower.resize_mode,
        limits=settings.limits,
    )


class Encoder:
    """Runs the tower over files' frames and writes the tokens, a shard a call.

    Args:
        tower: on its device.
        folder: the store.
        header: its header.
    """

    def __init__(self, tower: VisionTower, folder: Path, header: StoreHeader) -> None:
        self._tower, self._folder, self._header = tower, folder, header
        self._device = next(tower.parameters()).device

    def __call__(self, clips: Sequence[Pictures]) -> int:
        """Adds clips to the store; returns how many frames they have together."""
        if not clips:
            return 0
        lengths = [len(clip.frames) for clip in clips]
        frames = torch.from_numpy(np.concatenate([clip.frames for clip in clips]))
        parts = torch.split(frames, self._tower.config.micro_batch)
        tokens = torch.cat([self._tower(part.to(self._device)).to("cpu", torch.bfloat16) for part in parts])
        new = [
            NewClip(clip.key, clip.stamp, clip.path, part, clip.notes)
            for clip, part in zip(clips, torch.split(tokens, lengths), strict=True)
        ]
        write_shard(self._folder, self._header, new)
        return sum(lengths)
