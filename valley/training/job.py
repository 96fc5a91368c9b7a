"""What a job settles before its ranks start: the data in order, a sample looked at, the run folder, the MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Int64

from valley.checkpoints import store
from valley.data.collate import Sample
from valley.data.loading import Loader, reading_policy
from valley.data.manifest import Manifest, build_manifest
from valley.data.order import EpochOrder
from valley.data.rejects import KnownRejects, Reject, RejectBudget
from valley.data.split import split_rows
from valley.errors import RejectLimitError, SettingsError
from valley.model.processing import Encoded, ValleyProcessor, build_processor
from valley.training.ledger import REJECTS_FILE
from valley.training.mlflow_tracker import MlflowRun, end_run, start_run
from valley.training.settings import RunSettings
from valley.training.stage import count_steps
from valley.training.summary import SUMMARY_FILE

logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.json"
SAMPLE_FILE = "sample.txt"
SETTINGS_FILE = "settings.yaml"
_SLOTS_LOOKED_AT = 64


@dataclass(frozen=True)
class Job:
    """A run that is settled; small enough to travel to every rank.

    Attributes:
        settings: as given.
        processor: tokenises in training, and is saved with the model.
        loader: loads the training slots.
        held_out: loads the validation slots; None: there is no validation.
        total_steps: optimizer steps of the stage.
        mlflow: the MLflow run; None: not open, or tracking is off.
    """

    settings: RunSettings
    processor: ValleyProcessor
    loader: Loader
    held_out: Loader | None
    total_steps: int
    mlflow: MlflowRun | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.output)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints of the run lie."""
        return self.folder / "checkpoints"

    @property
    def rejects(self) -> list[Reject]:
        """Records that could not be used even before their media were looked at."""
        manifests = {loader.manifest.path: loader.manifest for loader in (self.loader, self.held_out) if loader}
        return [reject for manifest in manifests.values() for reject in manifest.rejects()]


def prepare_job(settings: RunSettings) -> Job:
    """Reads the data files and puts their samples in order; loads no weights and writes manifests only.

    Raises:
        SettingsError: settings that cannot be carried out.
        ModelError: no such tower, tokenizer or template.
        RejectLimitError: too large a share of the records cannot be parsed.
        StorageError: storage failed on every try.
    """
    if "://" in settings.output:
        raise SettingsError([f"output: {settings.output}: must be a folder that all workers see, not a URI"])
    data, stage = settings.data, settings.train
    processor = build_processor(settings.model, data.sampling)
    folder = Path(settings.output) / "manifests"
    manifest = build_manifest(data.sources, folder, sampling=data.sampling, limits=data.limits)
    RejectBudget(data.max_rejected, data.rejects_grace).add(len(manifest), manifest.rejects())
    rows, held_out_rows = _split(manifest, settings)
    order = EpochOrder(
        manifest.row_sources,
        manifest.lengths(processor.num_patches),
        [source.weight for source in data.sources],
        global_batch=stage.global_batch,
        seed=settings.seed,
        rows=rows,
    )
    held_out = None
    if data.validation.sources:
        other = build_manifest(
            data.validation.sources,
            folder,
            sampling=data.sampling,
            limits=data.limits,
            setting="data.validation.sources",
        )
        held_out = _held_out(other, None, processor, settings)
    elif len(held_out_rows):
        held_out = _held_out(manifest, held_out_rows, processor, settings)
    loader = _loader(manifest, order, processor, settings)
    return Job(settings, processor, loader, held_out, count_steps(order.batches_per_epoch, stage))


def open_job(job: Job, *, num_nodes: int = 1) -> Job:
    """Opens the run: MLflow, the run folder, and one sample shown with its supervised tokens marked.

    Checkpoints of an earlier run in the same folder are moved aside.

    Args:
        job: a job that is not open.
        num_nodes: nodes it will run on.

    Returns:
        The job with its MLflow run.

    Raises:
        TrackingError: MLflow cannot be used as configured.
        RejectLimitError: none of the first samples can be used: nothing would be learned.
        StorageError: storage failed on every try.
    """
    shown = show_sample(job)
    logger.info("one sample; what is supervised stands in double brackets, or in colour:\n%s", shown)
    job = replace(job, mlflow=start_run(job.settings, num_nodes=num_nodes))
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / SAMPLE_FILE).write_text(shown + "\n")
    (job.folder / SETTINGS_FILE).write_text(yaml.safe_dump(job.settings.model_dump(mode="json"), sort_keys=False))
    for stale in (ANSWERS_FILE, SUMMARY_FILE):  # an earlier run's must not be taken for this one's
        (job.folder / stale).unlink(missing_ok=True)
    if aside := store.set_aside(job.checkpoints):
        logger.warning("checkpoints of an earlier run were moved to %s", aside)
    return job


@contextmanager
def job_status(job: Job) -> Iterator[None]:
    """Ends the job's MLflow run as what happens within: finished, failed or killed."""
    try:
        yield
    except KeyboardInterrupt:
        end_run(job.mlflow, "KILLED")
        raise
    except BaseException:
        end_run(job.mlflow, "FAILED")
        raise
    end_run(job.mlflow, "FINISHED")


def show_sample(job: Job) -> str:
    """Returns the first sample that can be used as text, its supervised tokens marked.

    Raises:
        RejectLimitError: none of the first slots has one, with the reasons.
    """
    rejects: list[Reject] = []
    for slot in job.loader.order.batch(0)[:_SLOTS_LOOKED_AT].tolist():
        sample = job.loader.load(slot)
        rejects += sample.rejects
        if sample.weight:
            return f"{sample.sample_id}: {_mark(job.processor, sample)}"
    reasons = "\n".join(f"  {reject.sample_id}: {reject.path}: {reject.reason}" for reject in rejects[:10])
    raise RejectLimitError(f"nothing is supervised: none of the first samples can be used:\n{reasons}")


def _mark(processor: ValleyProcessor, sample: Sample) -> str:
    return processor.mask_sample(Encoded(sample.input_ids, sample.labels, sample.cut_tokens))


def _split(
    manifest: Manifest, settings: RunSettings
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " held_out"]]:
    """The rows to train on and those held out, which are none when validation has data files of its own."""
    validation = settings.data.validation
    if validation.sources or not validation.fraction:
        return np.arange(len(manifest)), np.zeros(0, dtype=np.int64)
    return split_rows(manifest.row_sources, *manifest.media_keys(), fraction=validation.fraction, seed=settings.seed)


def _held_out(
    manifest: Manifest, rows: Int64[np.ndarray, " rows"] | None, processor: ValleyProcessor, settings: RunSettings
) -> Loader:
    """The loader of held-out samples, each once in a seeded order."""
    order = EpochOrder(
        manifest.row_sources,
        manifest.lengths(processor.num_patches),
        [1.0] * len(manifest.sources),
        global_batch=settings.train.micro_batch,
        seed=settings.seed,
        rows=rows,
    )
    return _loader(manifest, order, processor, settings)


def _loader(manifest: Manifest, order: EpochOrder, processor: ValleyProcessor, settings: RunSettings) -> Loader:
    policy = reading_policy(settings.data)
    known = KnownRejects.load(Path(settings.output) / REJECTS_FILE, policy=policy)
    return Loader(manifest, order, processor, settings.data, size_px=processor.size_px, known=known)
