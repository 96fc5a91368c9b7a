"""What carries out a training step; a new engine is one new file and one line here."""

from __future__ import annotations

from valley.training.engines.base import Engine
from valley.training.engines.deepspeed_engine import DeepSpeedEngine
from valley.training.engines.torch_engine import TorchEngine

__all__ = ["ENGINES", "Engine"]

ENGINES = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}
"""By the name in `engine.name`; all are made as `ENGINES[name](model, groups, stage, settings, device)`."""
