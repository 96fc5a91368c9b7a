"""What trains in a stage, how fast, and for how long (paper 4.3, table 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

from valley.errors import SettingsError
from valley.model.modeling import PARTS, ValleyForConditionalGeneration
from valley.training.settings import StageSettings


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that train at one learning rate.

    Attributes:
        module: a part of the model, by its name in `valley.model.modeling.PARTS`.
        learning_rate: at the top of the schedule.
        parameters: by their names in the model.
    """

    module: str
    learning_rate: float
    parameters: dict[str, Parameter]


@dataclass(frozen=True)
class ModuleRow:
    """One line of the table of what trains."""

    module: str
    num_parameters: int
    num_trainable: int
    dtype: str
    learning_rate: float | None


def prepare(model: ValleyForConditionalGeneration, stage: StageSettings) -> list[ParameterGroup]:
    """Freezes everything, then thaws what the stage trains.

    What trains is held in fp32 (the master weights of mixed precision); with bf16 compute, what is frozen in bf16.
    Gradient checkpointing is switched as the stage says.

    Returns:
        One group for each part that trains and has parameters (v1 has none).

    Raises:
        SettingsError: nothing would train.
    """
    frozen_dtype = compute_dtype(stage)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    has_lora = bool(model.module_parameters("lora"))
    groups = [_group(model, stage, part) for part in PARTS if _trains(stage, part, has_lora=has_lora)]
    groups = [group for group in groups if group.parameters]
    if not groups:
        raise SettingsError([f"train.modules: nothing trains: {', '.join(stage.modules) or 'none'} have no parameters"])
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen_dtype)
    untyped: Any = model
    if stage.gradient_checkpointing:
        untyped.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        untyped.activation_checkpointing_disable()
    return groups


def compute_dtype(stage: StageSettings) -> torch.dtype:
    """Returns the precision that the stage computes in, and that what is frozen is held in."""
    return torch.bfloat16 if stage.precision == "bf16" else torch.float32


def what_trains(model: ValleyForConditionalGeneration, groups: Sequence[ParameterGroup]) -> list[ModuleRow]:
    """Returns the table of what trains: every module, trained or not, as the model stands now."""
    rates = {group.module: group.learning_rate for group in groups}
    rows = []
    for part in PARTS:
        parameters = list(model.module_parameters(part).values())
        if part == "lora" and not parameters:
            continue
        total, trainable = (
            sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])
        )
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})
        rows.append(ModuleRow(part, total, trainable, "+".join(dtypes) or "-", rates.get(part)))
    return rows


def format_table(rows: Sequence[ModuleRow]) -> str:
    """Lays the table of what trains out as text."""
    header = f"{'module':<14}{'parameters':>16}{'trainable':>16}  {'dtype':<18}{'learning rate':>13}"
    lines = [
        f"{row.module:<14}{row.num_parameters:>16,}{row.num_trainable:>16,}  {row.dtype:<18}"
        + (f"{row.learning_rate:>13.2e}" if row.learning_rate is not None else f"{'frozen':>13}")
        for row in rows
    ]
    total, trainable = sum(row.num_parameters for row in rows), sum(row.num_trainable for row in rows)
    share = trainable / total if total else 0.0
    return "\n".join([header, *lines, f"{'all':<14}{total:>16,}{trainable:>16,}  {share:.2%} of it trains"])


def count_steps(batches_per_epoch: int, stage: StageSettings) -> int:
    """Returns the optimizer steps of the stage; a part of an epoch is rounded up to whole batches."""
    steps = math.ceil(batches_per_epoch * stage.epochs)
    return steps if stage.max_steps is None else min(steps, stage.max_steps)


def learning_rate_factor(step: int, total_steps: int, warmup_ratio: float) -> float:
    """Returns the share of the peak learning rate at `step`: a straight rise, then a cosine that reaches 0 at the end.

    Step 0 learns already: over W = ceil(warmup_ratio * total_steps) steps of warm-up the factor is 1/(W+1), 2/(W+1), …
    and 1 at step W; at `total_steps`, one after the last, it is 0.
    """
    warmup_steps = math.ceil(warmup_ratio * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _trains(stage: StageSettings, part: str, *, has_lora: bool) -> bool:
    """Whether a part trains.

    The added tokens' rows train with the LLM, or by themselves when the stage says so (spec section 5). A low-rank
    update trains in the place of the LLM.
    """
    if part == "added_tokens":
        return "llm" in stage.modules or stage.train_added_tokens
    if part == "lora":
        return "llm" in stage.modules
    return part in stage.modules and not (part == "llm" and has_lora)


def _group(model: ValleyForConditionalGeneration, stage: StageSettings, part: str) -> ParameterGroup:
    rates: dict[str, float] = {str(name): rate for name, rate in stage.module_learning_rates.items()}
    rate = rates.get("llm" if part == "lora" else part, stage.learning_rate)
    return ParameterGroup(part, rate, model.module_parameters(part))
