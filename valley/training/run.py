"""A run from its settings to its summary: what one rank does, and the whole of it in one plain process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from valley.checkpoints import store
from valley.checkpoints.frozen import name_frozen
from valley.data.loading import Loader
from valley.errors import SettingsError
from valley.model.build import build_model
from valley.model.modeling import PARTS
from valley.training.curve import draw_loss_curve
from valley.training.engines import ENGINES, Engine
from valley.training.feed import Share, Stream, load_ahead
from valley.training.flops import FlopCounter, peak_flops
from valley.training.job import MASK_FILE, SETTINGS_FILE, Job, open_job, plan_job, prepare_job
from valley.training.ledger import Ledger
from valley.training.loop import Cadence, FitResult, fit
from valley.training.meter import StepMeter
from valley.training.mlflow_tracker import MlflowTracker, end_run
from valley.training.plan import Plan
from valley.training.progress import Progress, make_progress
from valley.training.settings import RunSettings
from valley.training.stage import format_table, learning_rate_factor, prepare, what_trains
from valley.training.summary import format_summary, summarise, write_summary
from valley.training.tracking import METRICS_FILE, FileTracker, Tracker, Trackers, flatten
from valley.training.validation import Validator, answer_prompts, append_answers, load_prompts

logger = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
ANSWERS_FILE = "answers.json"
CURVE_FILE = "loss.png"


def plan_run(settings: RunSettings) -> Plan:
    """Returns what a run is going to do, from metadata alone."""
    num_workers = settings.cluster.num_workers
    return plan_job(prepare_job(settings), num_workers=num_workers if isinstance(num_workers, int) else 1)


def run_plain(settings: RunSettings) -> str:
    """Trains in this process, without Ray; returns the summary as text.

    Raises:
        ValleyError: settings, data, model or storage cannot be used.
    """
    job = open_job(prepare_job(settings))
    with job_status(job):
        threads = max(1, (os.cpu_count() or 1) - 1)
        stream = partial(load_ahead, num_threads=threads)
        device = torch.device("cuda" if settings.cluster.gpu is not False and torch.cuda.is_available() else "cpu")
        summary = train_rank(job, stream=stream, validation_stream=stream, device=device)
    return format_summary(summary or {})


@contextmanager
def job_status(job: Job) -> Iterator[None]:
    """Ends the job's MLflow run, with the status that the body earned."""
    try:
        yield
    except KeyboardInterrupt:
        end_run(job.mlflow, "KILLED")
        raise
    except BaseException:
        end_run(job.mlflow, "FAILED")
        raise
    end_run(job.mlflow, "FINISHED")


def train_rank(job: Job, *, stream: Stream, validation_stream: Stream, device: torch.device) -> dict[str, Any] | None:
    """What one rank does: builds the model, trains it, writes checkpoints and, in the end, the model and the summary.

    Args:
        job: the run, prepared and opened.
        stream: loads the training samples.
        validation_stream: loads the held-out samples.
        device: where this rank computes.

    Returns:
        The summary, on rank 0.
    """
    settings, stage, folder = job.settings, job.settings.train, job.folder
    model = build_model(settings.model, seed=settings.seed)
    groups = prepare(model, stage)
    if not any(group.parameters for group in groups):
        raise SettingsError(
            [f"train.modules: {stage.modules} of model.temporal={settings.model.temporal} train nothing"]
        )
    flops = FlopCounter(model, groups) if peak_flops(device, stage.precision) else None
    table = format_table(what_trains(model, groups))
    frozen = _name_frozen(job, model)
    engine: Engine = ENGINES[settings.engine.name](model, groups, stage, settings.engine, device)
    progress = make_progress(job.total_steps, 0, engine.rank)
    progress.say(table)
    if engine.rank == 0:
        store.set_aside(folder / CHECKPOINTS_FOLDER)
        (folder / ANSWERS_FILE).unlink(missing_ok=True)
    engine.all_reduce_sum([0.0])
    tracker = _make_tracker(job, engine)
    ledger = Ledger(engine, folder, settings.data, before=job.training.manifest.rejects())
    keeper = _Keeper(job, engine, frozen)
    pad_id = job.processor.tokenizer.pad_token_id
    share = Share(job.training.order, engine.rank, engine.world_size, stage.micro_batch, 0, job.total_steps)
    samples = stream(job.training.loader(settings.data, job.processor), share.slots(), share.width)
    result = fit(
        engine,
        share.assemble(samples, pad_id),
        total_steps=job.total_steps,
        factor=lambda step: learning_rate_factor(step, job.total_steps, stage.warmup_ratio),
        meter=StepMeter(engine, flops, peak_flops(device, stage.precision)),
        cadence=Cadence(
            log_steps=settings.tracking.every_steps,
            evaluate_steps=settings.data.validation.every_steps,
            report_steps=settings.checkpoint.every_steps,
        ),
        tracker=tracker,
        progress=progress,
        inspect=ledger.inspect,
        report=keeper,
        evaluate=_make_evaluate(job, engine, validation_stream, tracker, progress),
    )
    progress.close()
    return _finish(job, engine, result, ledger, keeper, tracker)


class _Keeper:
    """Writes checkpoints and removes those that are no longer kept."""

    def __init__(self, job: Job, engine: Engine, frozen: dict[str, Any]) -> None:
        self._job, self._engine, self._frozen = job, engine, frozen
        self.root = job.folder / CHECKPOINTS_FOLDER
        self.last: Path | None = None

    def __call__(self, step: int, validation_loss: float | None) -> None:
        engine, settings = self._engine, self._job.settings
        info = {
            "step": step,
            "slot": step * settings.train.global_batch,
            "manifest": self._job.training.manifest.content_hash,
            "validation_loss": validation_loss,
            "mlflow_run_id": self._job.mlflow.run_id if self._job.mlflow else None,
            "frozen": self._frozen,
            "settings": settings.model_dump(mode="json"),
        }
        self.last = store.write(
            self.root,
            step,
            engine.save,
            info=info,
            rank=engine.rank,
            world_size=engine.world_size,
            agree=lambda done: engine.all_reduce_sum([float(done)])[0] == engine.world_size,
        )
        if engine.rank == 0:
            store.prune(self.root, settings.checkpoint.keep_last)


def _name_frozen(job: Job, model: torch.nn.Module) -> dict[str, Any]:
    """Names what is not written into checkpoints: each frozen part by its source and its content's hash."""
    settings = job.settings.model
    sources = {"vision": f"{settings.vision.name} {settings.vision.pretrained}", "llm": settings.llm.name}
    frozen = {}
    for part, module in PARTS.items():
        tensors = list(model.get_submodule(module).named_parameters())
        if tensors and not any(tensor.requires_grad for _, tensor in tensors):
            source = settings.path or sources.get(part, f"seed {job.settings.seed}")
            frozen[part] = asdict(name_frozen(source, tensors))
    return frozen


def _make_tracker(job: Job, engine: Engine) -> Tracker:
    if engine.rank != 0:
        return Trackers([])
    trackers: list[Tracker] = [FileTracker(job.folder / METRICS_FILE)]
    if job.mlflow:
        trackers.append(MlflowTracker(job.mlflow))
    tracker = Trackers(trackers)
    tracker.log_params(flatten(job.settings))
    tracker.log_artifact(job.folder / SETTINGS_FILE)
    tracker.log_artifact(job.folder / MASK_FILE)
    return tracker


def _make_evaluate(job: Job, engine: Engine, stream: Stream, tracker: Tracker, progress: Progress) -> Any:
    """Returns what `fit` calls to validate; None when nothing is held out."""
    if job.validation is None:
        return None
    held_out = job.settings.data.validation
    loader: Loader = job.validation.loader(job.settings.data, job.processor)
    validator = Validator(
        engine,
        loader,
        stream,
        pad_id=job.processor.tokenizer.pad_token_id,
        micro_batch=job.settings.train.micro_batch,
        max_samples=held_out.max_samples,
    )
    prompts = load_prompts(loader, held_out.prompts)

    def evaluate(step: int) -> float:
        validation = validator()
        tracker.log_metrics(step, validation.metrics())
        progress.say(f"step {step}: validation loss {validation.loss:.4f} on {validation.num_samples} samples")
        if answers := answer_prompts(engine, job.processor, prompts, step):
            append_answers(job.folder / ANSWERS_FILE, answers)
        return validation.loss

    return evaluate


def _finish(
    job: Job, engine: Engine, result: FitResult, ledger: Ledger, keeper: _Keeper, tracker: Tracker
) -> dict[str, Any] | None:
    """Writes the model, the rejects, the curve and the summary; rank 0 does, the others help gather the weights."""
    ledger.write()
    dtype = torch.bfloat16 if job.settings.train.precision == "bf16" else torch.float32
    weights = engine.whole_weights(dtype)
    if engine.rank != 0:
        return None
    folder = job.folder

    def write_model(target: Path) -> None:
        engine.model.save_pretrained(target, state_dict=weights)
        job.processor.save_pretrained(target)

    model = store.publish(folder / MODEL_FOLDER, write_model)
    draw_loss_curve(folder / METRICS_FILE, folder / CURVE_FILE, folder.name)
    best = store.best_complete(keeper.root)
    summary = summarise(
        result,
        model=model,
        checkpoint=keeper.last or keeper.root,
        best_checkpoint=best.path if best else None,
        num_rejected=len(ledger),
        mlflow=job.mlflow,
    )
    for path in (ledger.path, folder / CURVE_FILE, folder / ANSWERS_FILE, write_summary(folder, summary)):
        if path.exists():
            tracker.log_artifact(path)
    if job.settings.tracking.log_model:
        tracker.log_artifact(model, MODEL_FOLDER)
    tracker.close()
    return summary
