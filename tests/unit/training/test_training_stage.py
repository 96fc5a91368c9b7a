"""What trains is settled by name, shown as a table, and follows one schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from training_makers import MODEL, STAGE, batch, new_model

from valley.errors import SettingsError
from valley.model.build import build_model
from valley.training.settings import StageSettings
from valley.training.stage import count_steps, format_table, learning_rate_factor, prepare, what_trains


def test_the_rate_rises_straight_to_its_peak_and_falls_as_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 103, 0.03) for step in range(104)]

    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # 4 steps of warm-up: 3 % of 103, rounded up
    assert factors[4 + 99 // 3] == pytest.approx(0.75)
    assert factors[-1] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(factors[4:]))


@pytest.mark.parametrize(("total", "ratio"), [(1, 0.0), (1, 0.03), (2, 0.5)])
def test_even_the_shortest_run_learns_in_every_step(total: int, ratio: float) -> None:
    assert all(learning_rate_factor(step, total, ratio) > 0 for step in range(total))


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(1, None, 10), (2.5, None, 25), (0.25, None, 3), (3, 7, 7), (1, 50, 10)]
)
def test_steps_are_counted_from_batches_and_epochs(epochs: float, max_steps: int | None, expected: int) -> None:
    assert count_steps(10, StageSettings(epochs=epochs, max_steps=max_steps)) == expected


@pytest.mark.parametrize(
    ("modules", "added", "expected"),
    [
        (["temporal", "projector"], False, {"temporal", "projector"}),
        (["projector"], True, {"projector", "added_tokens"}),
        (["temporal", "projector", "llm"], False, {"temporal", "projector", "llm", "added_tokens"}),
    ],
)
def test_a_stage_trains_what_it_names_and_nothing_else(modules: list[str], added: bool, expected: set[str]) -> None:
    model = new_model()
    stage = StageSettings.model_validate({"modules": modules, "train_added_tokens": added})

    groups = prepare(model, stage)

    assert {group.module for group in groups} == expected
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {name for group in groups for name in group.parameters}
    assert {name.partition(".")[0].replace("language_model", "llm") for name in trains} == expected


def test_masters_are_fp32_and_what_is_frozen_computes_in_bf16() -> None:
    model = build_model(MODEL, seed=0, dtype=torch.bfloat16)

    prepare(model, STAGE.model_copy(update={"precision": "bf16"}))

    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_stage_that_trains_nothing_is_refused() -> None:
    model = build_model(MODEL.model_copy(update={"temporal": "v1"}), seed=0)

    with pytest.raises(SettingsError, match=r"train\.modules: nothing trains"):
        prepare(model, StageSettings(modules=["temporal"]))


def test_the_table_counts_every_parameter_once_and_gives_each_module_its_rate() -> None:
    model = new_model()
    rows = what_trains(model, prepare(model, STAGE))

    assert sum(row.num_parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert {row.module: row.learning_rate for row in rows} == {
        "vision": None,
        "temporal": 1e-2,
        "projector": 5e-3,
        "added_tokens": 1e-2,
        "llm": None,
    }
    assert {row.module for row in rows if row.num_trainable} == {"temporal", "projector", "added_tokens"}
    lines = format_table(rows).splitlines()
    assert lines[3].split() == ["projector", "8,320", "8,320", "float32", "5.00e-03"]


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = new_model()
        groups = prepare(model, STAGE.model_copy(update={"gradient_checkpointing": checkpointing}))
        model.train()
        assert model.is_activation_checkpointing == checkpointing
        model(**batch(range(8)).model_inputs()).loss.backward()
        gradients.append([p.grad for group in groups for p in group.parameters.values()])

    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)
