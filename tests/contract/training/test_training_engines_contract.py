"""Every engine trains the same: in one process or several, however the global batch is split, across a restart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from training_makers import (
    STAGE,
    batch,
    new_engine,
    new_model,
    run_ranks,
    run_settings,
    samples,
    train,
    trained_weights,
    write_data,
)

from valley.training.engines import ENGINES, Engine
from valley.training.feed import Step, load_ahead
from valley.training.job import Job, prepare_job
from valley.training.meter import StepMeter
from valley.training.settings import EngineSettings
from valley.training.validation import Validator

ALL = range(8)
SPLITS = {
    "1x8": [ALL],
    "2x4": [range(4), range(4, 8)],
    "4x2": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "8x1": [[row] for row in ALL],
}
# Micro-batches of two ranks; the first of the second rank's is text only, beside video on the first rank.
TWO_RANKS = [[[0, 2], [3, 5]], [[1, 4], [7, 6]]]
VARIANTS = {
    "torch": ("torch", EngineSettings()),
    "zero-1": ("deepspeed", EngineSettings(zero_stage=1, overlap_comm=False)),
    "zero-2": ("deepspeed", EngineSettings(zero_stage=2, overlap_comm=False)),
    "zero-2 overlapped": ("deepspeed", EngineSettings(zero_stage=2, overlap_comm=True)),
    "zero-2 off-loaded": ("deepspeed", EngineSettings(zero_stage=2, overlap_comm=False, offload=True)),
    "zero-3": ("deepspeed", EngineSettings(zero_stage=3, overlap_comm=False)),
}
FACTORS = [1.0, 0.8, 0.5, 0.3, 0.2, 0.1]


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Three steps of the whole batch at once in plain PyTorch, without any engine."""
    model = new_model()
    model.train()
    groups = [(["temporal", "added_tokens"], 1e-2), (["projector"], 5e-3)]
    parts = [
        ({n: p for part in parts for n, p in model.module_parameters(part).items()}, rate) for parts, rate in groups
    ]  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        [{"params": list(p.values()), "lr": rate} for p, rate in parts], betas=(0.9, 0.95), eps=1e-6, weight_decay=0
    )
    losses, norms = [], []
    for _ in range(3):
        loss = model(**batch(ALL).model_inputs()).loss
        loss.backward()
        parameters = [p for group, _ in parts for p in group.values()]
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for group, _ in parts for name, p in group.items()}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ENGINES)
def test_a_global_batch_gives_one_loss_norm_and_update_however_it_is_accumulated(
    name: str, split: str, reference: tuple[list[float], list[float], dict[str, torch.Tensor]]
) -> None:
    losses, norms, weights = reference
    engine = new_engine(name)

    found_losses, found_norms = train(engine, 3, SPLITS[split])

    assert found_losses == pytest.approx(losses, abs=1e-5)
    assert found_norms == pytest.approx(norms, rel=1e-4)
    for parameter, value in trained_weights(engine).items():
        torch.testing.assert_close(value, weights[parameter], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_frozen_stays_to_the_bit_and_all_that_trains_moves(name: str) -> None:
    engine = new_engine(name)
    before = {key: value.clone() for key, value in engine.model.state_dict().items()}
    trains = set(trained_weights(engine))

    train(engine, 2, [ALL])

    moved = {key for key, value in engine.model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == trains


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_gradient_that_is_not_finite_is_told_and_changes_nothing(
    variant: str, precision: Literal["fp32", "bf16"]
) -> None:
    name, settings = VARIANTS[variant]
    engine = new_engine(name, STAGE.model_copy(update={"precision": precision}), settings)
    train(engine, 1, [ALL])
    before = engine.whole_weights(torch.float32)

    engine.backward(engine.loss(batch(ALL), 1) * float("inf"), last=True)
    norm = engine.step(1.0)

    assert not math.isfinite(norm)
    assert all(torch.equal(value, before[key]) for key, value in engine.whole_weights(torch.float32).items())


@pytest.mark.parametrize("writer", ENGINES)
@pytest.mark.parametrize("reader", ENGINES)
def test_any_engine_goes_on_from_any_others_checkpoint(writer: str, reader: str, tmp_path: Path) -> None:
    first = new_engine(writer)
    train(first, 2, [ALL], FACTORS[:2])
    first.snapshot()(tmp_path)
    straight = train(first, 2, [ALL], FACTORS[2:4])

    second = new_engine(reader)
    second.load([tmp_path])
    resumed = train(second, 2, [ALL], FACTORS[2:4])

    tolerance = 0 if writer == reader else 1e-5
    assert resumed[0] == pytest.approx(straight[0], abs=tolerance)
    assert resumed[1] == pytest.approx(straight[1], abs=tolerance)


def test_bf16_computes_near_fp32_on_fp32_masters() -> None:
    stage = STAGE.model_copy(update={"precision": "bf16"})
    exact = train(new_engine("torch"), 3, [ALL])[0]
    for name in ENGINES:
        engine = new_engine(name, stage)
        assert train(engine, 3, [ALL])[0] == pytest.approx(exact, rel=2e-2)
        assert {p.dtype for key, p in engine.model.named_parameters() if "language_model" in key} == {torch.bfloat16}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_one_of_them_with_text_only_train_as_one(
    variant: str,
    two_ranks: list[dict[str, Any]],
    reference: tuple[list[float], list[float], dict[str, torch.Tensor]],
) -> None:
    losses, norms, weights = reference
    assert len(samples()) == sum(len(rows) for rank in TWO_RANKS for rows in rank)
    for results in two_ranks:
        found_losses, found_norms, found_weights = results[variant]
        assert found_losses == pytest.approx(losses, abs=1e-3)
        assert found_norms == pytest.approx(norms, rel=1e-3)
        for parameter, value in found_weights.items():
            if variant != "zero-3":  # where no rank holds them whole; what it trained is loaded and looked at below
                torch.testing.assert_close(value, weights[parameter], atol=1e-3, rtol=1e-3)


def test_ranks_gather_what_each_has_in_their_order(two_ranks: list[dict[str, Any]]) -> None:
    assert [results["gathered"] for results in two_ranks] == [["rank 0", "rank 1"]] * 2


@pytest.mark.parametrize("variant", ["zero-2", "zero-3"])
def test_what_two_ranks_saved_serves_one_rank_of_any_engine(
    variant: str, two_ranks: list[dict[str, Any]], folder: Path
) -> None:
    rows = [row for rank in TWO_RANKS for row in rank]
    straight = new_engine("torch")
    losses, _ = train(straight, 6, rows, FACTORS)

    for name in ENGINES:
        engine = new_engine(name)
        engine.load([folder / f"{variant}-{rank}" for rank in range(2)])
        assert train(engine, 3, rows, FACTORS[3:])[0] == pytest.approx(losses[3:], abs=1e-3)


def test_the_whole_weights_are_on_rank_0_though_no_rank_held_them(two_ranks: list[dict[str, Any]]) -> None:
    first, second = (results["whole weights"] for results in two_ranks)
    expected = new_model().state_dict()

    assert second == {}
    assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in expected.items()}
    head = "language_model.lm_head.weight"
    assert torch.equal(first[head], expected[head].to(torch.bfloat16))


def test_ranks_with_unequal_numbers_of_micro_batches_all_say_so_instead_of_waiting(
    two_ranks: list[dict[str, Any]],
) -> None:
    assert [results["unequal"] for results in two_ranks] == [
        "step 7: ranks have unequal numbers of micro-batches, here 1",
        "step 7: ranks have unequal numbers of micro-batches, here 2",
    ]


def test_ranks_share_out_the_held_out_samples_and_agree_on_the_loss(two_ranks: list[dict[str, Any]], job: Job) -> None:
    alone = validator(new_engine("torch"), job)()

    for results in two_ranks:
        together = results["validation"]
        assert together.num_samples == alone.num_samples == 7
        assert together.loss == pytest.approx(alone.loss, abs=1e-5)
        assert together.source_losses == pytest.approx(alone.source_losses, abs=1e-5)


def validator(engine: Engine, job: Job) -> Validator:
    assert job.held_out is not None
    return Validator(engine, job.held_out, load_ahead, pad_id=0, micro_batch=2, max_samples=7)


@pytest.fixture(scope="module")
def job(folder: Path) -> Job:
    sources = [write_data(folder, "pictures", 40), write_data(folder, "words", 30, pictures=False)]
    return prepare_job(run_settings(folder, sources))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(folder: Path, job: Job) -> list[dict[str, Any]]:
    """What two processes made of three steps with each variant, by rank; they also saved what they had then."""
    return run_ranks(2, _train_together, str(folder), job, folder=folder)


def _train_together(folder: str, job: Job) -> dict[str, Any]:
    rank = torch.distributed.get_rank()
    engine = new_engine("torch")
    results: dict[str, Any] = {"validation": validator(engine, job)()}
    try:
        StepMeter(engine).count(Step(7, (batch(ALL),) * (rank + 1)))
    except RuntimeError as error:
        results["unequal"] = str(error)
    for variant, (name, settings) in VARIANTS.items():
        rows = TWO_RANKS[rank]
        engine = new_engine(name, settings=settings)
        results[variant] = (*train(engine, 3, rows), trained_weights(engine))
        results["gathered"] = engine.all_gather([f"rank {rank}"])
        if variant in ("zero-2", "zero-3"):
            engine = new_engine(name, settings=settings)
            train(engine, 3, rows, FACTORS)
            (own := Path(folder) / f"{variant}-{rank}").mkdir()
            engine.snapshot()(own)
            results["whole weights"] = engine.whole_weights(torch.bfloat16)
    return results
