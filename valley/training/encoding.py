"""Computing the tower's tokens once, for every run on the same data: the job, and the same in one plain process."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from valley.checkpoints.store import write_json
from valley.config import Location, Settings
from valley.data.rejects import Reject, write_rejects
from valley.errors import SettingsError
from valley.features.encode import Encoder, Estimate, Pictures, Reader, Task, estimate, list_tasks, seconds_per_frame
from valley.features.identity import StoreHeader, identify_tower
from valley.features.store import FeatureStore, open_store
from valley.model.build import build_tower
from valley.model.vision import VisionTower
from valley.training.job import prepare_job
from valley.training.ledger import REJECTS_FILE
from valley.training.settings import RunSettings
from valley.training.summary import SUMMARY_FILE

logger = logging.getLogger(__name__)


class StoreSettings(Settings):
    """How tokens are kept."""

    precision: Literal["bf16", "int8"] = "bf16"
    """`int8` takes half the room: a scale for each channel of each clip."""
    pooled: bool = False
    """Keep the mean of a clip's patches only, which is all that v1 asks for."""
    clips_per_shard: PositiveInt = 64
    """Files encoded and written together; a crash loses what has not been written."""


class EncodeSettings(RunSettings):
    """One job that fills a store: the settings of the runs that are to read it, and how it is kept."""

    features: Location = "features"
    """The store: a folder that all workers see."""
    store: StoreSettings = StoreSettings()


@dataclass
class EncodeJob:
    """What there is to encode.

    Attributes:
        settings: as given.
        tower: in fp32, on the CPU.
        store: as it is now.
        tasks: all files, those in the store included.
        estimate: what a full store will take.
    """

    settings: EncodeSettings
    tower: VisionTower
    store: FeatureStore
    tasks: list[Task]
    estimate: Estimate


def prepare_encoding(settings: EncodeSettings, device: torch.device) -> EncodeJob:
    """Lists the files, makes the store or opens it to go on, and says what it will take.

    Raises:
        ValleyError: settings, data or model cannot be used, or the folder holds a store of another tower.
    """
    if "://" in settings.features:
        raise SettingsError([f"features: {settings.features}: must be a folder that all workers see, not a URI"])
    tower, header, tasks, expected = _plan(settings, device)
    store = open_store(Path(settings.features), header)
    logger.info("%s; %d clips are there already", expected, len(store))
    return EncodeJob(settings, tower, store, tasks, expected)


def plan_encoding(settings: EncodeSettings) -> Estimate:
    """Returns what filling the store will take, from metadata alone.

    Raises:
        ValleyError: settings, data or model cannot be used.
    """
    return _plan(settings, pick_device(settings))[-1]


def pick_device(settings: EncodeSettings) -> torch.device:
    """Returns where this process computes."""
    gpu = settings.cluster.gpu is not False and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def _plan(settings: EncodeSettings, device: torch.device) -> tuple[VisionTower, StoreHeader, list[Task], Estimate]:
    run = prepare_job(settings.model_copy(update={"features": ""}))
    manifests = list(
        {loader.manifest.path: loader.manifest for loader in (run.loader, run.held_out) if loader}.values()
    )
    tower = build_tower(settings.model)
    header = StoreHeader(tower=identify_tower(tower), precision=settings.store.precision, pooled=settings.store.pooled)
    tasks = list(list_tasks(manifests))
    return tower, header, tasks, estimate(manifests, len(tasks), header, seconds_per_frame(tower.to(device), device))


@dataclass
class Tally:
    """What became of the files.

    Attributes:
        files: encoded now.
        frames: of them.
        rejects: files that cannot be used.
    """

    files: int = 0
    frames: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def add(self, outcomes: Iterable[Pictures | Reject | None]) -> list[Pictures]:
        """Counts what readers returned; returns what is to be encoded."""
        pictures: list[Pictures] = []
        for outcome in outcomes:
            if isinstance(outcome, Reject):
                self.rejects.append(outcome)
            elif outcome is not None:
                pictures.append(outcome)
        self.files += len(pictures)
        return pictures


def encode_plain(settings: EncodeSettings) -> str:
    """Fills a store in this process alone, without Ray; returns the summary as text.

    Raises:
        ValleyError: settings, data, model or storage cannot be used.
    """
    started_s, device = time.perf_counter(), pick_device(settings)
    job = prepare_encoding(settings, device)
    encoder = Encoder(job.tower.to(device), job.store.folder, job.store.header)
    tally = Tally()
    for outcomes in _read_ahead(Reader(job.store, settings.data), job.tasks, settings.store.clips_per_shard):
        tally.frames += encoder(tally.add(outcomes))
    return finish_encoding(job, tally, time.perf_counter() - started_s)


def _read_ahead(reader: Reader, tasks: Sequence[Task], number: int) -> Iterator[list[Pictures | Reject | None]]:
    """Reads `number` files at a time, on threads, the next ones while the last are encoded."""
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="read") as threads:
        waiting: list[Iterator[Pictures | Reject | None]] = []
        for start in range(0, len(tasks), number):
            waiting.append(threads.map(reader, tasks[start : start + number]))
            if len(waiting) > 1:
                yield list(waiting.pop(0))
        for outcomes in waiting:
            yield list(outcomes)


def finish_encoding(job: EncodeJob, tally: Tally, seconds: float) -> str:
    """Writes the rejects and the summary into the store; returns the summary as text."""
    folder = job.store.folder
    store = FeatureStore(folder)
    write_rejects(tally.rejects, folder / REJECTS_FILE)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.tokens"))
    summary: dict[str, Any] = {
        "files": len(job.tasks),
        "encoded_now": tally.files,
        "frames_now": tally.frames,
        "frames_per_s": round(tally.frames / seconds, 2),
        "clips": len(store),
        "bytes": num_bytes,
        "bytes_estimated": job.estimate.num_bytes,
        "rejected": len(tally.rejects),
        "rejected_by_reason": dict(Counter(reject.reason for reject in tally.rejects)),
        "seconds": round(seconds, 2),
        "store": str(folder),
    }
    write_json(folder / SUMMARY_FILE, summary)
    return "\n".join(f"{name:<18} {value}" for name, value in summary.items())
