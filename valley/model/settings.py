"""Which model a run builds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from valley.config import Location, Settings, Weights
from valley.model.temporal import TEMPORAL


class VisionSettings(Settings):
    """The frozen vision tower (spec: open_clip, second-to-last block, no final norm)."""

    name: str = "ViT-L-14-quickgelu"
    """An open_clip model with a ViT tower, or `tiny` or `small`: random ones built in code."""
    pretrained: Weights | None = "openai"
    """open_clip's tag, or a path of weights; null: random weights (said loudly)."""
    seed: NonNegativeInt = 0
    """Seed of random weights: a tower that never trains is the same for every `seed` of a run."""
    layer: int = -2
    """Block whose output is used; -1 is the last, -2 the one before (LLaVA's choice; the paper is silent)."""
    micro_batch: int = 32
    """Frames that go through the tower at once."""
    standardise: bool = False
    """Bring the tower's output to zero mean and unit deviation in each channel, measured once, on the first training
    samples of a new model, and stored with it."""


class LLMSettings(Settings):
    """The language model."""

    name: Weights = "lmsys/vicuna-13b-v1.5"
    """A Hugging Face causal LM by hub name or folder, or `tiny` or `small`: random ones built in code."""
    gguf_file: str | None = None
    """A GGUF file inside `name` to take the weights from."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention back-end."""
    random_weights: bool = False
    """Take only the configuration and tokenizer and draw the weights at random (shape tests, benchmarks)."""


class LoRASettings(Settings):
    """A low-rank update of the language model, trained instead of its weights."""

    rank: PositiveInt = 64
    """Rank of the update."""
    alpha: PositiveInt = 128
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the update's inputs that is dropped in training."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Layers that get one, by the ends of their names; `all-linear`: all but the output layer."""

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / self.rank


class ModelSettings(Settings):
    """What to build; `path` overrides all but the LLM's attention."""

    path: Location | None = None
    """A saved Valley model to start from: its folder, or that of the run that made it."""
    vision: VisionSettings = VisionSettings()
    llm: LLMSettings = LLMSettings()
    temporal: str = "v1"
    """Temporal module (paper 4.2): a name in `valley.model.temporal.TEMPORAL`."""
    placement: Literal["before_projector", "after_projector"] = "before_projector"
    """Where the temporal module stands: the paper's place, or that of the published code."""
    template: str = "valley"
    """Prompt template: a name in `valley.model.templates.TEMPLATES`."""
    system: str | None = None
    """System message; null: the template's own."""

    @field_validator("temporal")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in TEMPORAL:
            raise ValueError(f"no such temporal module; known: {', '.join(TEMPORAL)}")
        return name
