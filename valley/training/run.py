"""A training run: what each rank does from the settled job to the final model, and the same in one plain process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from valley.checkpoints import store
from valley.checkpoints.places import Place, on_disk
from valley.data.collate import Sample
from valley.data.loading import Loader
from valley.errors import CheckpointError, DivergedError, RejectLimitError, SettingsError
from valley.features.identity import identify_tower
from valley.features.reading import check_features
from valley.model.build import build_model
from valley.model.lora import add_lora
from valley.training.curve import draw_loss_curve
from valley.training.engines import ENGINES, Engine
from valley.training.engines.base import place_among_ranks
from valley.training.feed import Share, Step, Stream, load_ahead, one_ahead
from valley.training.flops import FlopCounter, peak_flops
from valley.training.guard import Guard
from valley.training.job import ANSWERS_FILE, SAMPLE_FILE, SETTINGS_FILE, Job, job_status, open_job, prepare_job
from valley.training.keeper import Keeper, name_frozen_parts
from valley.training.ledger import Ledger
from valley.training.loop import Cadence, FitResult, fit
from valley.training.meter import Figures, StepMeter, process_gauges
from valley.training.mlflow_tracker import MlflowTracker
from valley.training.profiling import PROFILE_FOLDER, profiling
from valley.training.progress import Progress, make_progress
from valley.training.record import RECORD_FILE, read_record, write_record
from valley.training.resume import take_over
from valley.training.settings import RunSettings
from valley.training.stage import ModuleRow, compute_dtype, format_table, learning_rate_factor, prepare, what_trains
from valley.training.standardise import standardise
from valley.training.summary import format_summary, read_summary, summarise, write_summary
from valley.training.tracking import METRICS_FILE, FileTracker, Tracker, Trackers, flatten
from valley.training.validation import (
    ACCURACY,
    Exam,
    Validator,
    answer_prompts,
    append_answers,
    drop_answers,
    load_prompts,
)
from valley.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

TABLE_FILE = "what_trains.txt"
CURVE_FILE = "loss_curve.png"


def run_plain(settings: RunSettings) -> str:
    """Trains in this process alone, without Ray; returns the summary as text.

    Raises:
        ValleyError: settings, data, model or storage cannot be used.
    """
    job = open_job(prepare_job(settings))
    with job_status(job):
        gpu = settings.cluster.gpu is not False and torch.cuda.is_available()
        if settings.cluster.gpu is True and not gpu:
            raise SettingsError(["cluster.gpu: true, but this machine has no GPU that torch can use"])
        stream = partial(load_ahead, num_threads=max(1, (os.cpu_count() or 1) - 1))
        train_rank(job, stream=stream, validation_stream=stream, device=torch.device("cuda" if gpu else "cpu"))
    return format_summary(read_summary(job.folder))


def train_rank(
    job: Job,
    *,
    device: torch.device,
    stream: Stream = load_ahead,
    validation_stream: Stream = load_ahead,
    report: Callable[[Place], None] = lambda checkpoint: None,
    gauges: Callable[[], dict[str, float]] = process_gauges,
    followed: bool = False,
) -> FitResult:
    """Trains as one rank of torch's process group, or alone when there is none; all ranks call it.

    Args:
        job: what to do, open.
        device: where to compute.
        stream: loads the training slots.
        validation_stream: loads the held-out ones.
        report: is told of every checkpoint once it is complete, on all ranks.
        gauges: figures of the moment, for the curves.
        followed: another process shows the steps.

    Returns:
        The figures of the run; rank 0 has also written the final model and `summary.json` into the run folder.
    """
    settings, stage = job.settings, job.settings.train
    engine, meter, keeper, parts = _build(job, device)
    table = format_table(parts)
    result = take_over(job, engine, keeper.frozen)
    standardise(job, engine)
    first_step = result.totals.num_steps
    ledger = Ledger(engine, job.folder, settings.data, job.rejects, num_used=result.totals.num_samples)
    watchdog = Watchdog(settings.cluster.stuck_after_s, job.folder / f"stuck-rank-{engine.rank}.txt")
    with (
        _outlets(job, engine, first_step, followed=followed) as (tracker, progress),
        profiling(
            settings.profile if engine.rank == 0 else None, job.folder / PROFILE_FOLDER, tracker.log_artifact
        ) as profiled,
        watchdog,
    ):
        progress.say(table)
        _log_beginnings(job, engine, table, tracker, first_step)
        guard = Guard(engine, job.folder, stage.spike)

        def judge(step: Step, figures: Figures) -> None:
            watchdog.beat()
            guard.judge(step, figures)
            profiled()

        def keep(known: FitResult, validation_loss: float | None) -> None:
            ledger.write()
            watchdog.beat()
            if complete := keeper.keep(known, validation_loss):
                report(complete)

        try:
            fit(
                engine,
                _feed(job, engine, stream, first_step),
                total_steps=job.total_steps,
                factor=partial(learning_rate_factor, total_steps=job.total_steps, warmup_ratio=stage.warmup_ratio),
                meter=meter,
                cadence=_cadence(settings),
                tracker=tracker,
                progress=progress,
                inspect=ledger.inspect,
                judge=judge,
                report=keep,
                evaluate=_examiner(job, engine, ledger, tracker, progress, _beating(watchdog, validation_stream)),
                gauges=gauges if engine.rank == 0 else dict,
                result=result,
            )
        except (DivergedError, RejectLimitError):
            with suppress(CheckpointError):  # raised on all ranks: what is being written is worth having
                keeper.finish()
            raise
        finally:
            progress.close()
            ledger.write()
            tracker.log_artifact(ledger.path)
        if complete := keeper.finish():
            report(complete)
        _finish(job, engine, keeper, ledger, tracker, result, parts)
    return result


def _beating(watchdog: Watchdog, stream: Stream) -> Stream:
    """The same stream, every batch of which shows that something is being done."""

    def beating(loader: Loader, slots: Int64[np.ndarray, " N"], batch_size: int) -> Iterator[list[Sample]]:
        for samples in stream(loader, slots, batch_size):
            watchdog.beat()
            yield samples

    return beating


def _feed(job: Job, engine: Engine, stream: Stream, first_step: int) -> Iterator[Step]:
    """This rank's part of the global batches from `first_step` on, one step ahead of the training."""
    micro_batch, pad_id = job.settings.train.micro_batch, job.processor.tokenizer.pad_token_id
    share = Share(job.loader.order, engine.rank, engine.world_size, micro_batch, first_step, job.total_steps)
    samples = stream(job.loader, share.slots(), share.width)
    return one_ahead(share.assemble(samples, pad_id, pin=engine.device.type == "cuda"))


def _cadence(settings: RunSettings) -> Cadence:
    return Cadence(
        log_steps=settings.tracking.every_steps,
        evaluate_steps=settings.data.validation.every_steps,
        report_steps=settings.checkpoint.every_steps,
    )


def _build(job: Job, device: torch.device) -> tuple[Engine, StepMeter, Keeper, list[ModuleRow]]:
    """Builds the model and what trains it; also returns what it consists of."""
    settings, stage = job.settings, job.settings.train
    _settle_on(device)
    model = build_model(settings.model, seed=settings.seed, dtype=compute_dtype(stage))
    if settings.features:
        measured = settings.model.vision.standardise and settings.model.path is None
        tower = identify_tower(model.vision_tower)
        check_features(Path(settings.features), tower, temporal=model.config.temporal, standardise=measured)
    if settings.lora and "llm" in stage.modules:
        add_lora(model, settings.lora, seed=settings.seed)
    groups = prepare(model, stage)
    parts = what_trains(model, groups)
    frozen = name_frozen_parts(model, groups, settings) if place_among_ranks()[0] == 0 else {}
    peak = peak_flops(device, stage.precision)
    flops = FlopCounter(model, groups) if peak else None
    engine = ENGINES[settings.engine.name](model, groups, stage, settings.engine, device)
    return engine, StepMeter(engine, flops, peak), Keeper(job, engine, frozen), parts


def _settle_on(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Hugging Face imports DeepSpeed when it saves a model, whatever the engine; it would ask where its GPU is.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@contextmanager
def _outlets(job: Job, engine: Engine, first_step: int, *, followed: bool) -> Iterator[tuple[Tracker, Progress]]:
    """Where numbers and words go; only rank 0's go anywhere."""
    trackers: list[Tracker] = []
    if engine.rank == 0:
        trackers.append(FileTracker(job.folder / METRICS_FILE, first_step=first_step))
        if job.mlflow:
            trackers.append(MlflowTracker(job.mlflow, flush_s=job.settings.tracking.flush_s))
    tracker, progress = Trackers(trackers), make_progress(job.total_steps, first_step, engine.rank, followed=followed)
    try:
        yield tracker, progress
    finally:
        tracker.close()


def _log_beginnings(job: Job, engine: Engine, table: str, tracker: Tracker, first_step: int) -> None:
    if engine.rank != 0:
        return
    drop_answers(job.folder / ANSWERS_FILE, first_step)
    if record := read_record(job.checkpoints):
        record = record.started(first_step, engine.world_size)
        write_record(job.checkpoints, record)
        tracker.log_metrics(first_step, {"run/restarts": len(record.starts) - 1})
        with on_disk(job.checkpoints / RECORD_FILE) as file:
            tracker.log_artifact(file)
    (job.folder / TABLE_FILE).write_text(table + "\n")
    tracker.log_params(flatten(job.settings))
    for name in (SETTINGS_FILE, SAMPLE_FILE, TABLE_FILE):
        tracker.log_artifact(job.folder / name)


def _examiner(
    job: Job, engine: Engine, ledger: Ledger, tracker: Tracker, progress: Progress, stream: Stream
) -> Callable[[int], float] | None:
    """Returns what measures the validation loss and shows answers; None when nothing is held out."""
    if job.held_out is None:
        return None
    validation = job.settings.data.validation
    validator = Validator(
        engine,
        job.held_out,
        stream,
        pad_id=job.processor.tokenizer.pad_token_id,
        micro_batch=job.settings.train.micro_batch,
        max_samples=validation.max_samples,
    )
    takes_part = engine.rank == 0 or not engine.replicates_weights
    prompts = load_prompts(job.held_out, validation.prompts) if takes_part else []
    answers_file = job.folder / ANSWERS_FILE
    exam = None
    if validation.questions:
        exam = Exam(
            engine,
            job.processor,
            job.held_out,
            stream,
            micro_batch=job.settings.train.micro_batch,
            max_questions=validation.questions,
        )

    def examine(done: int) -> float:
        found = validator()
        accuracy = exam() if exam else {}
        ledger.inspect_held_out(found.rejects, found.num_samples)
        tracker.log_metrics(done, found.metrics() | accuracy)
        right = f"; {accuracy[ACCURACY]:.1%} of the questions answered rightly" if accuracy else ""
        progress.say(f"step {done}: {found}{right}")
        if answers := answer_prompts(engine, job.processor, prompts, done):
            append_answers(answers_file, answers)
            tracker.log_artifact(answers_file)
        return found.loss

    return examine


def _finish(
    job: Job,
    engine: Engine,
    keeper: Keeper,
    ledger: Ledger,
    tracker: Tracker,
    result: FitResult,
    parts: Sequence[ModuleRow],
) -> None:
    """Writes the final model, the loss curve and the summary."""
    model = keeper.save_model()
    if engine.rank != 0:
        return
    folder = job.folder
    newest = next(iter(store.complete(job.checkpoints)), None)
    best = store.best_complete(job.checkpoints)
    draw_loss_curve(folder / METRICS_FILE, folder / CURVE_FILE, f"{folder.name}: {job.total_steps} steps")
    summary = summarise(
        result,
        parts=parts,
        model=model,
        checkpoint=newest.path if newest else None,
        best_checkpoint=best.path if best else None,
        rejects=ledger.rejects,
        rejects_table=ledger.path,
        mlflow=job.mlflow,
    )
    artifacts = [folder / CURVE_FILE, write_summary(folder, summary)]
    if job.settings.tracking.log_model:
        artifacts.append(model)
    for path in artifacts:
        tracker.log_artifact(path)
