"""What is compared, and how: the trainings, the space they are drawn from, and the questions that decide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from valley.config import PRESETS, Location, Settings
from valley.evaluation.settings import QuestionSettings
from valley.training.encoding import StoreSettings
from valley.training.settings import on_or_off
from valley.training.two_stages import TwoStages


class Range(Settings):
    """Numbers to draw from; whole ones when both ends are."""

    low: float | int
    high: float | int
    log: bool = False
    """Draw the logarithm evenly."""

    @model_validator(mode="after")
    def _is_one(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, not {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError("the logarithm of what is not positive cannot be drawn")
        return self


class StoppingSettings(Settings):
    """ASHA (Li et al., 2020): trials that are behind at a milestone stop there."""

    grace: PositiveInt = 1
    """Validations that every trial gets."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """One in so many goes on at each milestone, which come at grace, grace * reduction, … validations."""


class RegistrySettings(Settings):
    """Where the best model is entered in MLflow's registry."""

    name: str = "valley"
    """Registered model; every comparison adds a version."""
    alias: str = "best"
    """Alias that this version gets: MLflow finds it as `models:/valley@best`."""


class CompareSettings(TwoStages):
    """One comparison. The stages are those of every trial, but for what the search space changes in them."""

    presets: ClassVar[Path] = PRESETS / "compare"

    output: Location = "runs/compare"
    """Folder of the comparison: trials, features, report."""
    search: Annotated[dict[str, Annotated[list[Any], Field(min_length=1)] | Range], Field(min_length=1)] = {
        "model.temporal": ["v1", "v2", "v3"]
    }
    """Dotted settings of the stages and what to try for each: a list of values, all tried, or a range, drawn from.
    A path that begins with `pretrain.` or `finetune.` is one of that stage alone."""
    draws: PositiveInt = 1
    """Points drawn from the ranges, each combined with all lists."""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = [0, 1, 2]
    """Each point of the space is trained once with each."""
    baselines: dict[str, dict[str, Any]] = {
        "text only": {"data.blind": True},
        "one frame": {"data.sampling.mode": "fixed", "data.sampling.num_frames": 1},
    }
    """Trainings that check the questions: the first point of the space, changed so, with the first seed."""
    evaluation: QuestionSettings
    """The questions that every trial is asked when it is trained; `frames` is set by the comparison."""
    shuffled: bool = True
    """Ask every trial again with the frames in a random order."""
    share_features: bool = True
    """Encode all files once, for all trials; false: each trial decodes and encodes them in each epoch. A stage with
    `features` of its own reads those."""
    features: Location = ""
    """Folder of the stores; empty: `features` in the output folder."""
    store: StoreSettings = StoreSettings()
    concurrent: PositiveInt = 1
    """Trials that run at once; the cluster is shared out among them."""
    stopping: Annotated[StoppingSettings | None, BeforeValidator(on_or_off)] = None
    """`true`, or its settings: stop trials that are behind. They are left out of the tables, which then tell of the
    seeds that did well; baselines are never stopped."""
    registry: Annotated[RegistrySettings | None, BeforeValidator(on_or_off)] = RegistrySettings()
    """`false`: enter no model."""
    resume: bool = False
    """Go on with the comparison in the output folder (`--resume`): what is finished is kept."""

    @model_validator(mode="after")
    def _distinct(self) -> CompareSettings:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each once")
        return self

    @model_validator(mode="after")
    def _stages_agree(self) -> CompareSettings:
        plain = {stage.cluster.num_workers == 0 for stage in (self.pretrain, self.finetune) if stage}
        if len(plain) > 1:
            raise ValueError("cluster.num_workers: 0 (one plain process) in both stages or in neither")
        return self

    @model_validator(mode="after")
    def _stops_by_something(self) -> CompareSettings:
        validation = self.finetune.data.validation
        if self.stopping and not (validation.questions and (validation.sources or validation.fraction)):
            raise ValueError("stopping goes by finetune.data.validation.questions, which is 0, or nothing is held out")
        return self
