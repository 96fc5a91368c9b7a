"""The loop calls what is due when it is due, tells true figures, and goes on from a checkpoint as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_makers import STAGE, batch, new_engine, new_model, trained_weights

from valley.training.engines import Engine
from valley.training.feed import Step
from valley.training.flops import FlopCounter
from valley.training.loop import Cadence, FitResult, fit
from valley.training.meter import Counts, StepMeter
from valley.training.progress import Silent
from valley.training.stage import prepare
from valley.training.tracking import FileTracker, read_curve

ROWS = [[0, 1], [2, 3], [4, 5], [6, 7]]


def steps(first: int, last: int) -> Iterator[Step]:
    """Step k has two micro-batches, the k-th and the one after."""
    for index in range(first, last):
        yield Step(index, tuple(batch(ROWS[(index + turn) % 4]) for turn in range(2)))


class Run:
    """Runs `fit` and remembers what it called, in order."""

    def __init__(self, folder: Path, losses: dict[int, float] | None = None) -> None:
        self.calls: list[tuple[str, int, float | None]] = []
        self._losses, self._curve = losses, folder / "metrics.jsonl"

    def fit(
        self, engine: Engine, feed: Iterator[Step], total_steps: int, cadence: Cadence, result: FitResult | None = None
    ) -> FitResult:
        tracker = FileTracker(self._curve, first_step=result.totals.num_steps if result else 0)
        found = fit(
            engine,
            feed,
            total_steps=total_steps,
            factor=lambda step: 1 / (step + 1),
            meter=StepMeter(engine),
            cadence=cadence,
            tracker=tracker,
            progress=Silent(),
            inspect=self._inspect,
            judge=lambda step, figures: None,
            report=lambda known, loss: self.calls.append(("report", known.totals.num_steps, loss)),
            evaluate=self._evaluate if self._losses else None,
            result=result,
        )
        tracker.close()
        return found

    def curve(self, name: str) -> dict[int, float]:
        return read_curve(self._curve, name)

    def _inspect(self, step: Step, counts: Counts) -> None:
        self.calls.append(("inspect", step.index, None))

    def _evaluate(self, done: int) -> float:
        assert self._losses is not None
        self.calls.append(("evaluate", done, None))
        return self._losses[done]


def test_checkpoints_come_at_their_steps_at_the_end_and_whenever_validation_is_best(tmp_path: Path) -> None:
    losses = {2: 3.0, 4: 5.0, 6: float("nan"), 8: 2.0, 9: 2.5}
    run = Run(tmp_path, losses)

    result = run.fit(new_engine("torch"), steps(0, 9), 9, Cadence(log_steps=4, evaluate_steps=2, report_steps=3))

    # 2 and 8 are the best so far, 3 and 6 are due, 9 is the end; only what was measured at that very step goes along.
    reports = [(done, loss) for call, done, loss in run.calls if call == "report"]
    assert [done for done, _ in reports] == [2, 3, 6, 8, 9]
    assert [loss for done, loss in reports if done != 6] == [3.0, None, 2.0, 2.5]
    assert [done for call, done, _ in run.calls if call == "evaluate"] == [2, 4, 6, 8, 9]
    assert [index for call, index, _ in run.calls if call == "inspect"] == list(range(9))
    assert (result.best_loss, result.best_step, result.validation_loss) == (2.0, 8, 2.5)
    assert list(run.curve("train/loss")) == [4, 8, 9]


def test_a_cadence_of_zero_means_only_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, {3: 1.0})

    run.fit(new_engine("torch"), steps(0, 3), 3, Cadence(log_steps=1, evaluate_steps=0, report_steps=0))

    assert [call for call in run.calls if call[0] != "inspect"] == [("evaluate", 3, None), ("report", 3, 1.0)]


def test_the_figures_are_those_of_the_global_batch(tmp_path: Path) -> None:
    run, engine = Run(tmp_path), new_engine("torch")
    whole = batch([0, 1, 2, 3])
    with torch.no_grad():
        expected = engine.model(**whole.model_inputs()).loss.item()

    result = run.fit(engine, steps(0, 1), 1, Cadence(1, 0, 0))

    assert result.loss_first == pytest.approx(expected, abs=1e-5)
    totals = result.totals
    assert (totals.num_samples, totals.num_frames, totals.num_tokens) == (4, 3 + 1 + 7, whole.num_tokens)
    places = sum(batch(rows).input_ids.numel() for rows in ROWS[:2])
    assert run.curve("data/padding_share")[1] == pytest.approx(1 - whole.num_tokens / places)
    assert run.curve("train/supervised_tokens")[1] == whole.num_supervised
    assert run.curve("train/learning_rate/temporal")[1] == pytest.approx(1e-2)
    assert run.curve("train/learning_rate/projector")[1] == pytest.approx(5e-3)
    assert 0 <= run.curve("data/wait_share")[1] < 1
    assert run.curve("memory/peak_gib")[1] > 0.05


def test_going_on_from_a_checkpoint_gives_the_same_losses_and_weights_to_the_bit(tmp_path: Path) -> None:
    cadence = Cadence(1, 0, 0)
    straight, whole = Run(tmp_path / "straight"), new_engine("torch")
    straight.fit(whole, steps(0, 6), 6, cadence)

    broken, first = Run(tmp_path / "broken"), new_engine("torch")
    known = broken.fit(first, steps(0, 3), 3, cadence)
    first.snapshot()(tmp_path)
    second = new_engine("torch")
    second.load([tmp_path])
    result = broken.fit(second, steps(3, 6), 6, cadence, known)

    assert broken.curve("train/loss") == straight.curve("train/loss")
    assert broken.curve("train/grad_norm") == straight.curve("train/grad_norm")
    weights = trained_weights(whole)
    assert all(torch.equal(value, weights[name]) for name, value in trained_weights(second).items())
    assert result.totals.num_steps == 6


def test_a_loss_that_is_not_finite_is_told_not_hidden(tmp_path: Path) -> None:
    run, engine = Run(tmp_path), new_engine("torch")
    with torch.no_grad():
        engine.model.projector.bias.fill_(float("nan"))

    result = run.fit(engine, steps(0, 1), 1, Cadence(1, 0, 0))

    assert result.loss_last != result.loss_last
    assert run.curve("train/loss")[1] != run.curve("train/loss")[1]


def test_a_feed_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended after step 2 of 5"):
        Run(tmp_path).fit(new_engine("torch"), steps(0, 2), 5, Cadence(1, 0, 0))


@pytest.mark.parametrize("modules", [["temporal", "projector"], ["temporal", "projector", "llm"]])
@pytest.mark.parametrize("row", [0, 3, 5])
def test_model_flops_are_those_that_torch_counts_but_for_the_masked_half_of_attention(
    modules: list[str], row: int
) -> None:
    model = new_model()
    stage = STAGE.model_validate(STAGE.model_dump() | {"modules": modules})
    counter = FlopCounter(model, prepare(model, stage))
    model.train()
    one = batch([row])

    with FlopCounterMode(display=False) as reference:
        model(**one.model_inputs()).loss.backward()

    text = model.config.text_config
    masked_half = 3 * 2 * text.num_hidden_layers * text.hidden_size * one.num_tokens**2
    assert counter(one) + masked_half == pytest.approx(reference.get_total_flops(), rel=0.02)
