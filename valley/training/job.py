"""What a job settles before its ranks start: the data in order, a sample looked at, the run folder, the MLflow run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Int64

from valley.checkpoints import store
from valley.checkpoints.places import Place, children, to_place
from valley.checkpoints.standardisation import STANDARDISATION_FILE
from valley.data.collate import Sample
from valley.data.loading import Loader, reading_policy
from valley.data.manifest import Manifest, build_manifest, differing_sampling
from valley.data.order import EpochOrder
from valley.data.rejects import KnownRejects, Reject, RejectBudget
from valley.data.settings import SourceSettings
from valley.data.split import split_rows
from valley.errors import RejectLimitError, SettingsError
from valley.features.reading import StoredFeatures
from valley.features.store import FeatureStore
from valley.model.processing import Encoded, ValleyProcessor, build_processor
from valley.model.saved import MODEL_FOLDER
from valley.training.ledger import REJECTS_FILE
from valley.training.mlflow_tracker import MlflowRun, run_status, start_run
from valley.training.record import RunRecord, identity_of, read_record, write_record
from valley.training.settings import RunSettings
from valley.training.stage import count_steps
from valley.training.summary import SUMMARY_FILE
from valley.training.tracking import METRICS_FILE

logger = logging.getLogger(__name__)

ANSWERS_FILE = "answers.json"
SAMPLE_FILE = "sample.txt"
SETTINGS_FILE = "settings.yaml"
ADAPTER_FOLDER = "adapter"
CHECKPOINTS_FOLDER = "checkpoints"
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
    def checkpoints(self) -> Place:
        """Where the checkpoints of the run lie, and its record."""
        return checkpoints_of(self.settings)

    @property
    def rejects(self) -> list[Reject]:
        """Records that could not be used even before their media were looked at."""
        manifests = {loader.manifest.path: loader.manifest for loader in (self.loader, self.held_out) if loader}
        return [reject for manifest in manifests.values() for reject in manifest.rejects()]


def checkpoints_of(settings: RunSettings) -> Place:
    """Returns where the checkpoints of a run lie.

    Raises:
        SettingsError: a URI whose protocol is unknown, or whose package is not installed.
    """
    return to_place(settings.checkpoint.path or str(Path(settings.output) / CHECKPOINTS_FOLDER))


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
    data = settings.data
    if data.known_rejects and not Path(data.known_rejects).is_file():
        raise SettingsError([f"data.known_rejects: {data.known_rejects}: no such file"])
    if not any(source.weight for source in data.sources):
        raise SettingsError(["data.sources: every weight is 0: there is nothing to learn from"])
    processor = build_processor(settings.model, data.sampling)
    manifest = _manifest(settings, data.sources, "data.sources")
    RejectBudget(data.max_rejected, data.rejects_grace).add(len(manifest), manifest.rejects())
    # Serving must sample as training did, so the processor that is saved knows what differed from source to source.
    processor.source_sampling = differing_sampling(data.sources, data.sampling)
    rows, held_out_rows = _split(manifest, settings)
    weights = [source.weight for source in data.sources]
    loader = _loader(manifest, processor, settings, weights, settings.train.global_batch, rows)
    held_out = None
    if data.validation.sources:
        other = _manifest(settings, data.validation.sources, "data.validation.sources")
        held_out = _loader(other, processor, settings, [1.0] * len(other.sources), settings.train.micro_batch)
    elif len(held_out_rows):
        held_out = _loader(
            manifest, processor, settings, [1.0] * len(weights), settings.train.micro_batch, held_out_rows
        )
    return Job(settings, processor, loader, held_out, count_steps(loader.order.batches_per_epoch, settings.train))


def open_job(job: Job, *, num_nodes: int = 1) -> Job:
    """Opens the run: MLflow, the run folder, and one sample shown with its supervised tokens marked.

    An unfinished run of the same settings and data in the folder goes on, in its own MLflow run. A finished one makes
    room: its checkpoints are moved aside.

    Args:
        job: a job that is not open.
        num_nodes: nodes it will run on.

    Returns:
        The job with its MLflow run.

    Raises:
        SettingsError: the folder holds an unfinished run of other settings, or `checkpoint.path` something else.
        TrackingError: MLflow cannot be used as configured.
        RejectLimitError: none of the first samples can be used: nothing would be learned.
        StorageError: storage failed on every try.
    """
    identity = identity_of(job.settings, job.loader.manifest.content_hash)
    if record := _unfinished(job, identity):
        run_id = record.mlflow.run_id if record.mlflow else None
        mlflow = start_run(job.settings, num_nodes=num_nodes, run_id=run_id)
        write_record(job.checkpoints, replace(record, mlflow=mlflow or record.mlflow))
        if not (job.folder / SETTINGS_FILE).exists():  # checkpoints elsewhere outlive a run folder
            _write_beginnings(job, find_sample(job))
        return replace(job, mlflow=mlflow)
    _refuse_leftovers(job)
    sample = find_sample(job)
    logger.info("one sample; what is supervised stands in colour, or in double brackets:\n%s", _show(job, sample))
    job = replace(job, mlflow=start_run(job.settings, num_nodes=num_nodes))
    _write_beginnings(job, sample)
    for stale in (ANSWERS_FILE, METRICS_FILE, STANDARDISATION_FILE, SUMMARY_FILE):  # an earlier run's, not this one's
        (job.folder / stale).unlink(missing_ok=True)
    own = [] if job.settings.checkpoint.path else [Path(job.folder / CHECKPOINTS_FOLDER)]
    for earlier in (*own, job.folder / ADAPTER_FOLDER, job.folder / MODEL_FOLDER):
        if aside := store.set_aside(earlier):
            logger.warning("what an earlier run made was moved to %s", aside)
    write_record(job.checkpoints, RunRecord(identity, job.mlflow))
    return job


def _write_beginnings(job: Job, sample: Sample) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / SAMPLE_FILE).write_text(_show(job, sample, colour=False) + "\n")
    (job.folder / SETTINGS_FILE).write_text(yaml.safe_dump(job.settings.model_dump(mode="json"), sort_keys=False))


def _refuse_leftovers(job: Job) -> None:
    """Raises SettingsError where a new run would write among whatever is there: only a run folder is cleared for it."""
    place = job.settings.checkpoint.path
    if place and children(job.checkpoints):
        raise SettingsError([f"checkpoint.path: {place} is not empty: choose another place, or remove what is there"])


def _unfinished(job: Job, identity: Mapping[str, str]) -> RunRecord | None:
    """Returns the record of the run that is to go on; None when a new one begins.

    Raises:
        SettingsError: there is one, of other settings or data.
    """
    record = read_record(job.checkpoints)
    if record is None or not job.settings.checkpoint.resume or (job.folder / SUMMARY_FILE).exists():
        return None
    if differences := record.differences(identity):
        raise SettingsError(
            [
                f"output: {job.folder} holds an unfinished run that differs in what follows. Go on with its settings, "
                "choose another output, or begin anew with checkpoint.resume=false",
                *differences,
            ]
        )
    return record


def is_finished(settings: RunSettings) -> bool:
    """Returns whether the run folder holds a run of these settings and data that has come to its end."""
    folder = Path(settings.output)
    record = read_record(checkpoints_of(settings))
    if record is None or not (folder / SUMMARY_FILE).exists():
        return False
    return not record.differences(identity_of(settings, prepare_job(settings).loader.manifest.content_hash))


def job_status(job: Job) -> AbstractContextManager[None]:
    """Ends the job's MLflow run as what happens within: finished, failed or killed."""
    return run_status(job.mlflow)


def find_sample(job: Job) -> Sample:
    """Returns the first sample that can be used.

    Raises:
        RejectLimitError: none of the first slots has one, with the reasons.
    """
    rejects: list[Reject] = []
    order = job.loader.order
    batches = map(order.batch, range(min(order.batches_per_epoch, _SLOTS_LOOKED_AT)))
    for slot in islice((slot for batch in batches for slot in batch.tolist()), _SLOTS_LOOKED_AT):
        sample = job.loader.load(slot)
        rejects += sample.rejects
        if sample.weight:
            return sample
    reasons = "\n".join(f"  {reject.sample_id}: {reject.path}: {reject.reason}" for reject in rejects[:10])
    raise RejectLimitError(f"nothing is supervised: none of the first samples can be used:\n{reasons}")


def _show(job: Job, sample: Sample, *, colour: bool | None = None) -> str:
    encoded = Encoded(sample.input_ids, sample.labels, sample.cut_tokens)
    return f"{sample.sample_id}: {job.processor.mask_sample(encoded, colour=colour)}"


def _manifest(settings: RunSettings, sources: Sequence[SourceSettings], setting: str) -> Manifest:
    data, folder = settings.data, Path(settings.output) / "manifests"
    return build_manifest(sources, folder, sampling=data.sampling, limits=data.limits, setting=setting)


def _split(
    manifest: Manifest, settings: RunSettings
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " held_out"]]:
    """The rows to train on and those held out, which are none when validation has data files of its own."""
    validation, everything = settings.data.validation, np.arange(len(manifest))
    if validation.sources or not validation.fraction:
        return everything, everything[:0]
    train, held_out = split_rows(
        manifest.row_sources, *manifest.media_keys(), fraction=validation.fraction, seed=settings.seed
    )
    if not len(held_out):
        logger.warning(
            "no validation: data.validation.fraction=%g of %d samples is none", validation.fraction, len(manifest)
        )
    return train, held_out


def _loader(
    manifest: Manifest,
    processor: ValleyProcessor,
    settings: RunSettings,
    weights: Sequence[float],
    global_batch: int,
    rows: Int64[np.ndarray, " rows"] | None = None,
) -> Loader:
    lengths = manifest.lengths(processor.num_patches)
    order = EpochOrder(manifest.row_sources, lengths, weights, global_batch=global_batch, seed=settings.seed, rows=rows)
    own = Path(settings.output) / REJECTS_FILE
    known = KnownRejects.load(Path(settings.data.known_rejects or own), policy=reading_policy(settings.data))
    features = StoredFeatures(FeatureStore(Path(settings.features))) if settings.features else None
    return Loader(manifest, order, processor, settings.data, **processor.framing, known=known, features=features)
