"""A run's settings, whole: what to build, what to learn from, how, on what, and where it is written down."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from valley.config import Location, Settings
from valley.data.settings import DataSettings
from valley.model.settings import LoRASettings, ModelSettings

Module = Literal["temporal", "projector", "llm"]
Beta = Annotated[float, Field(ge=0, lt=1)]


def on_or_off(value: object) -> object:
    """Makes `true` a group of settings with its defaults, `false` none; anything else stays as it is."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class StageSettings(Settings):
    """One training stage (paper 4.3, table 6); the defaults are the paper's stage 1."""

    modules: Annotated[list[Module], Field(min_length=1)] = ["temporal", "projector"]
    """What trains; the vision tower never does."""
    train_added_tokens: bool = False
    """Train the embedding rows of the six added tokens although the LLM is frozen."""
    learning_rate: PositiveFloat = 2e-3
    """Peak learning rate (section 5.1)."""
    module_learning_rates: dict[Module | Literal["added_tokens"], PositiveFloat] = {}
    """Peak learning rates of single modules; others take `learning_rate`."""
    epochs: PositiveFloat = 1
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Stop after this many steps; the schedule is laid out for them."""
    global_batch: PositiveInt = 128
    """Samples in an optimizer step, over all workers."""
    micro_batch: PositiveInt = 8
    """Samples in one forward pass on one worker."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps with a rising learning rate, before the cosine to 0."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the optimizer's two averages."""
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down."""
    spike: Annotated[float, Field(gt=1)] = 1.5
    """A loss this many times the highest of the last steps is noted with its samples (`spikes.jsonl`)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass (non-reentrant)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; what trains keeps fp32 masters."""

    @model_validator(mode="after")
    def _rates_of_what_trains(self) -> StageSettings:
        trained = {*self.modules, *(["added_tokens"] if self.train_added_tokens or "llm" in self.modules else [])}
        if idle := [name for name in self.module_learning_rates if name not in trained]:
            raise ValueError(f"module_learning_rates names what does not train: {', '.join(idle)}")
        return self


class EngineSettings(Settings):
    """What carries out a step."""

    name: Literal["deepspeed", "torch"] = "deepspeed"
    """`deepspeed`: ZeRO over the workers; `torch`: plain PyTorch."""
    zero_stage: Literal[1, 2, 3] = 2
    """DeepSpeed's ZeRO stage (table 6: 2)."""
    offload: bool = False
    """Keep the optimizer's state in CPU memory (DeepSpeed)."""
    overlap_comm: bool = True
    """Overlap gradient reduction with the backward pass (DeepSpeed)."""


class CheckpointSettings(Settings):
    """Where checkpoints are kept, when they are written and how many."""

    path: Location = ""
    """Folder or fsspec URI (`s3://bucket/my-run`) of this run's checkpoints; empty: `checkpoints` in the run folder."""
    every_steps: NonNegativeInt = 500
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 3
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    resume: bool = True
    """Go on with an unfinished run in the run folder; false: begin anew, its checkpoints are moved aside
    (with a `path` of its own, that has to be empty)."""


class TrackingSettings(Settings):
    """Where MLflow writes."""

    enabled: bool = True
    uri: str | None = None
    """MLflow tracking URI; null: `$MLFLOW_TRACKING_URI`, else SQLite beside the run folder."""
    experiment: str = "valley"
    run_name: str | None = None
    """Name of the run; null: the run folder's name."""
    parent: str | None = None
    """Id of the MLflow run that this one is a child of."""
    every_steps: PositiveInt = 1
    """Steps between two points of a curve."""
    flush_s: PositiveFloat = 120.0
    """Seconds to wait, at the end, for what has not reached the server yet, the model included."""
    log_model: bool = True
    """Keep the final model among the run's artifacts, besides the run folder."""


class ProfileSettings(Settings):
    """Which steps torch's profiler watches, on the first worker."""

    after: NonNegativeInt = 10
    """Steps that pass before it warms up, for one step."""
    steps: PositiveInt = 5
    """Steps that it watches."""
    shapes: bool = False
    """Record the shapes of what operators are given."""
    memory: bool = False
    """Record what operators allocate and free."""


class ClusterSettings(Settings):
    """Who gets which CPUs and GPUs."""

    address: str | None = None
    """Ray cluster to join; null: `$RAY_ADDRESS`, else a local one is started."""
    num_workers: NonNegativeInt | Literal["auto"] | tuple[PositiveInt, PositiveInt] = "auto"
    """Training workers; `auto`: one a GPU, or one on CPUs; 0: one plain process without Ray; [1, 4]: as many as there
    are, going on with what is left when nodes are lost, and on more GPUs when nodes with GPUs join."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Times that lost workers are replaced and the training goes on from its last checkpoint; -1: always."""
    stuck_after_s: PositiveFloat | None = 1800.0
    """Seconds without a step after which a worker counts as stuck and ends itself, more than a checkpoint takes to be
    written or uploaded; null: never."""
    gpu: bool | Literal["auto"] = "auto"
    """Train on GPUs; `auto`: when the cluster has one."""
    cpus_per_worker: NonNegativeFloat | Literal["auto"] = "auto"
    """Logical CPUs of a training worker, and its threads; `auto`: 1 beside a GPU, else its part of half of all CPUs."""
    cpus_per_decoder: PositiveFloat = 0.5
    """Logical CPUs of a decode task."""
    max_decoders: PositiveInt | None = None
    """Decode tasks at once over the whole cluster; null: what the free CPUs allow."""
    memory_share: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the object store that samples in flight may fill."""


class RunSettings(Settings):
    """Everything about one training run."""

    output: Location = "runs/pretrain"
    """Run folder: settings, checkpoints, rejects, curves, `summary.json`."""
    seed: NonNegativeInt = 0
    """Seed of the order of samples, of new weights and of splits."""
    model: ModelSettings = ModelSettings()
    data: DataSettings
    features: Location = ""
    """A store of the tower's tokens, made by `jobs/encode.py`: read in the place of pictures. Empty: decode and encode
    anew in every epoch."""
    train: StageSettings = StageSettings()
    lora: Annotated[LoRASettings | None, BeforeValidator(on_or_off)] = None
    """`true`, or its settings: train a low-rank update in the place of the LLM, when that is to train."""
    engine: EngineSettings = EngineSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    tracking: TrackingSettings = TrackingSettings()
    profile: Annotated[ProfileSettings | None, BeforeValidator(on_or_off)] = None
    """`true`, or its settings: write a trace of a few steps and a table of operators into `profile/`."""
    cluster: ClusterSettings = ClusterSettings()
