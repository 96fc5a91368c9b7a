"""What a run is made of before any weights are loaded: prepared once, by the driver, and handed to every rank."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from jaxtyping import Int64

from valley.data.loading import Loader, reading_policy
from valley.data.manifest import Manifest, build_manifest
from valley.data.order import EMPTY, EpochOrder
from valley.data.rejects import KnownRejects
from valley.data.settings import DataSettings
from valley.data.split import split_rows
from valley.errors import RecordError, SettingsError
from valley.model.build import build_model
from valley.model.processing import ValleyProcessor, build_processor
from valley.training.ledger import REJECTS_FILE
from valley.training.mlflow_tracker import MlflowRun, start_run
from valley.training.plan import Plan, plan_memory, plan_source
from valley.training.settings import RunSettings
from valley.training.stage import count_steps, prepare, what_trains

logger = logging.getLogger(__name__)

MASK_FILE = "label_mask.txt"
SETTINGS_FILE = "settings.yaml"
_MASKS_TRIED = 64


@dataclass(frozen=True)
class Side:
    """One side of the data: what is trained on, or what is held out.

    Attributes:
        manifest: the records.
        order: which of them is in which slot.
        known: files that an earlier run rejected.
    """

    manifest: Manifest
    order: EpochOrder
    known: KnownRejects

    def loader(self, data: DataSettings, processor: ValleyProcessor) -> Loader:
        """Returns what loads its slots."""
        return Loader(self.manifest, self.order, processor, data, size_px=processor.size_px, known=self.known)


@dataclass(frozen=True)
class Job:
    """A run, prepared; small enough to travel to every rank.

    Attributes:
        settings: the run's settings.
        processor: what the model is spoken to through.
        training: what is trained on.
        validation: what is held out, if anything.
        mlflow: where the run is tracked.
    """

    settings: RunSettings
    processor: ValleyProcessor
    training: Side
    validation: Side | None
    mlflow: MlflowRun | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.output)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return count_steps(self.training.order.batches_per_epoch, self.settings.train)


def prepare_job(settings: RunSettings) -> Job:
    """Reads the data files and settles which sample comes when; nothing is decoded and no weights are loaded.

    Raises:
        SettingsError: data or settings cannot be used.
        ModelError: the model's parts do not fit, or are unknown.
    """
    folder = Path(settings.output)
    processor = build_processor(settings.model, settings.data.sampling)
    data, train = settings.data, settings.train
    manifests = folder / "manifests"
    manifest = build_manifest(data.sources, manifests, sampling=data.sampling, limits=data.limits)
    known = KnownRejects.load(folder / REJECTS_FILE, policy=reading_policy(data))

    def side(manifest: Manifest, weights: list[float], batch: int, rows: Int64[np.ndarray, " rows"] | None) -> Side:
        lengths = manifest.lengths(processor.num_patches)
        order = EpochOrder(manifest.row_sources, lengths, weights, global_batch=batch, seed=settings.seed, rows=rows)
        return Side(manifest, order, known)

    kept, held_out = None, None
    validation: Side | None = None
    if data.validation.sources:
        other = build_manifest(
            data.validation.sources,
            manifests,
            sampling=data.sampling,
            limits=data.limits,
            setting="data.validation.sources",
        )
        validation = side(other, [1.0] * len(other.sources), train.micro_batch, None)
    elif data.validation.fraction:
        fraction, seed = data.validation.fraction, settings.seed
        kept, held_out = split_rows(manifest.row_sources, *manifest.media_keys(), fraction=fraction, seed=seed)
        if len(held_out):
            validation = side(manifest, [1.0] * len(manifest.sources), train.micro_batch, held_out)
        else:
            logger.warning("data.validation.fraction: %g of so few samples is none: no validation", fraction)
    weights = [source.weight for source in data.sources]
    if not any(weights):
        raise SettingsError(["data.sources: every weight is 0: there is nothing to learn from"])
    return Job(settings, processor, side(manifest, weights, train.global_batch, kept), validation)


def open_job(job: Job, *, num_nodes: int = 1) -> Job:
    """Opens the run: its folder with settings and one sample's label mask, and its MLflow run.

    Raises:
        SettingsError: not one of the samples looked at has a supervised token.
        TrackingError: MLflow cannot be used as configured.
    """
    mask = show_mask(job)
    run = start_run(job.settings, num_nodes=num_nodes)
    job.folder.mkdir(parents=True, exist_ok=True)
    settings = job.settings.model_dump(mode="json")
    (job.folder / SETTINGS_FILE).write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    (job.folder / MASK_FILE).write_text(show_mask(job, colour=False) + "\n")
    logger.info("one sample, with what is supervised marked:\n%s", mask)
    return Job(job.settings, job.processor, job.training, job.validation, run)


def show_mask(job: Job, *, colour: bool | None = None) -> str:
    """Returns the first sample that can be encoded, its supervised tokens marked; its frames are guessed, not decoded.

    Raises:
        SettingsError: none of the first samples has a supervised token.
    """
    manifest, rows = job.training.manifest, job.training.order.rows(0)
    reasons = []
    for row in rows[rows != EMPTY][:_MASKS_TRIED].tolist():
        record = manifest.record(row)
        num_media = len(record.media)
        frames = [max(1, math.ceil(int(manifest.num_frames[row]) / num_media))] * num_media
        try:
            encoded = job.processor.encode(record.messages, frames, max_tokens=job.settings.data.max_tokens)
        except RecordError as error:
            reasons.append(str(error))
            continue
        return job.processor.mask_sample(encoded, colour=colour)
    raise SettingsError([f"data.sources: nothing is supervised in the first {len(reasons)} samples; {reasons[0]}"])


def plan_job(job: Job, *, num_workers: int) -> Plan:
    """Returns what the run is going to do, from metadata alone; the model is laid out without memory."""
    settings = job.settings
    manifest, data = job.training.manifest, settings.data
    sources = [
        plan_source(manifest, index, job.processor, data, seed=settings.seed) for index in range(len(manifest.sources))
    ]
    with torch.device("meta"):
        model = build_model(settings.model, seed=settings.seed)
    modules = what_trains(model, prepare(model, settings.train))
    longest = max((int(source.tokens.max()) for source in sources if len(source.tokens)), default=data.max_tokens)
    memory = plan_memory(modules, model.config, settings, longest=longest, num_workers=num_workers)
    return Plan(
        sources=sources,
        max_tokens=data.max_tokens,
        steps=job.total_steps,
        samples_per_epoch=job.training.order.samples_per_epoch,
        modules=modules,
        memory=memory,
        num_workers=num_workers,
    )
