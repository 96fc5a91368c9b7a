"""What carries out a training step; a new engine is one new file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from valley.model.modeling import ValleyForConditionalGeneration
from valley.training.engines.base import Engine
from valley.training.engines.deepspeed_engine import DeepSpeedEngine
from valley.training.engines.torch_engine import TorchEngine
from valley.training.settings import EngineSettings, StageSettings
from valley.training.stage import ParameterGroup

__all__ = ["ENGINES", "Engine"]

MakeEngine = Callable[
    [ValleyForConditionalGeneration, Sequence[ParameterGroup], StageSettings, EngineSettings, torch.device], Engine
]

ENGINES: dict[str, MakeEngine] = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}
"""By the name in `engine.name`; made from the model, what trains of it, settings and this rank's device."""
