"""The training loop: steps in, weights changed, numbers out. It knows neither Ray nor MLflow nor any benchmark."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from valley.training.engines.base import Engine
from valley.training.feed import Step
from valley.training.meter import Counts, Figures, StepMeter, Totals
from valley.training.progress import Moment, Progress
from valley.training.tracking import Tracker


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in steps; 0: only at the end.

    Attributes:
        log_steps: between two points of a curve.
        evaluate_steps: between two validations.
        report_steps: between two checkpoints.
    """

    log_steps: int
    evaluate_steps: int
    report_steps: int


@dataclass
class FitResult:
    """What a run amounted to.

    Attributes:
        totals: sums over the steps of this run.
        loss_first: of the first step of this run.
        loss_last: of the last.
        validation_loss: the last one measured.
        best_loss: the lowest validation loss.
        best_step: the step it was measured after.
    """

    totals: Totals = field(default_factory=Totals)
    loss_first: float | None = None
    loss_last: float | None = None
    validation_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None

    def improves(self, loss: float) -> bool:
        """Whether a validation loss is the lowest so far."""
        return math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)


def fit(
    engine: Engine,
    steps: Iterator[Step],
    *,
    total_steps: int,
    factor: Callable[[int], float],
    meter: StepMeter,
    cadence: Cadence,
    tracker: Tracker,
    progress: Progress,
    inspect: Callable[[Step, Counts], None],
    judge: Callable[[Step, Figures], None],
    report: Callable[[FitResult, float | None], None],
    evaluate: Callable[[int], float] | None = None,
    gauges: Callable[[], dict[str, float]] = dict,
    result: FitResult | None = None,
) -> FitResult:
    """Trains until `total_steps` steps are taken; every rank calls it.

    Args:
        engine: carries out the steps.
        steps: this rank's share of every global batch, in order, from the step to begin with.
        total_steps: the number of the last step, counted from 1.
        factor: step -> share of the peak learning rate.
        meter: turns steps into figures.
        cadence: how often `tracker`, `evaluate` and `report` are called; all are also called at the end.
        tracker: takes the figures (rank 0's is listened to).
        progress: shows the figures.
        inspect: looks at every step before it is taken, on all ranks, and may stop the run.
        judge: looks at every step after it was taken, likewise.
        report: writes a checkpoint, given the figures so far and the validation loss just measured, if it was. It is
            also called whenever that loss is the lowest so far, so that the best weights are always kept.
        evaluate: measures the validation loss, given the steps taken.
        gauges: read at every point of a curve: what is true of a moment, not of a step.
        result: what was known before, when a run goes on.

    Returns:
        The figures of the whole run.

    Raises:
        RuntimeError: the steps ended too early, or ranks came with unequal numbers of micro-batches.
    """
    result = result or FitResult()
    done = result.totals.num_steps
    if done >= total_steps:
        return result
    for step, wait_s in _timed(steps):
        figures = _take_step(engine, step, wait_s, factor(step.index), meter, inspect)
        judge(step, figures)
        done = step.index + 1
        result.totals.add(figures)
        result.loss_first = figures.loss if result.loss_first is None else result.loss_first
        result.loss_last = figures.loss
        is_last = done >= total_steps
        if _due(done, cadence.log_steps, is_last):
            tracker.log_metrics(done, figures.metrics() | gauges())
        progress.update(_moment(done, figures))
        measured = None
        if evaluate is not None and _due(done, cadence.evaluate_steps, is_last):
            measured = result.validation_loss = evaluate(done)
        improved = measured is not None and result.improves(measured)
        if improved:
            result.best_loss, result.best_step = measured, done
        if improved or _due(done, cadence.report_steps, is_last):
            report(result, measured)
        if is_last:
            return result
    raise RuntimeError(f"the feed ended after step {done} of {total_steps}")


def _take_step(
    engine: Engine, step: Step, wait_s: float, factor: float, meter: StepMeter, inspect: Callable[[Step, Counts], None]
) -> Figures:
    """One optimizer step; the number of supervised tokens is summed over ranks before the first backward pass."""
    started_s = time.perf_counter()
    counts = meter.count(step)
    inspect(step, counts)
    num_items = max(counts.num_supervised, 1)
    parts = []
    for index, batch in enumerate(step.batches, start=1):
        part = engine.loss(batch.to(engine.device), num_items)
        engine.backward(part, last=index == len(step.batches))
        parts.append(part.detach())
    norm = engine.step(factor)
    loss = torch.stack(parts).sum().item()
    return meter.measure(counts, loss, norm, factor, wait_s=wait_s, work_s=time.perf_counter() - started_s)


def _timed(steps: Iterator[Step]) -> Iterator[tuple[Step, float]]:
    """Yields each step with the seconds that it was waited for."""
    while True:
        started_s = time.perf_counter()
        try:
            step = next(steps)
        except StopIteration:
            return
        yield step, time.perf_counter() - started_s


def _due(done: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and done % every == 0)


def _moment(done: int, figures: Figures) -> Moment:
    rate = max(figures.learning_rates.values())
    return Moment(done, figures.loss, rate, figures.samples_per_s, figures.wait_share)
