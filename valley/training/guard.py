"""Looks at every step's numbers: what is not finite stops the run, what jumps is written down with its samples."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from pathlib import Path

from valley.errors import DivergedError
from valley.training.engines.base import Engine
from valley.training.feed import Step
from valley.training.meter import Figures

logger = logging.getLogger(__name__)

SPIKES_FILE = "spikes.jsonl"
_REMEMBERED = 50
_FEWEST = 10


class Guard:
    """Judges steps; every rank calls it, and all come to the same judgement, as a step's figures are of all ranks.

    Args:
        engine: gathers the samples of all ranks.
        folder: where `spikes.jsonl` goes.
        spike: a loss this many times the highest of the last steps is a spike. The highest, as batches are sorted by
            length, and those of a small source among large ones may always be harder.
    """

    def __init__(self, engine: Engine, folder: Path, spike: float) -> None:
        self._engine, self._path, self._spike = engine, folder / SPIKES_FILE, spike
        self._losses: deque[float] = deque(maxlen=_REMEMBERED)

    def judge(self, step: Step, figures: Figures) -> None:
        """Looks at a step that was taken.

        Raises:
            DivergedError: loss or gradient is not finite; no weight was changed by the step.
        """
        if not (math.isfinite(figures.loss) and math.isfinite(figures.grad_norm)):
            raise DivergedError(step.index + 1, figures.loss, figures.grad_norm, self._samples(step))
        if len(self._losses) >= _FEWEST and figures.loss > self._spike * max(self._losses):
            self._note(step, figures.loss)
        self._losses.append(figures.loss)

    def _note(self, step: Step, loss: float) -> None:
        samples = self._samples(step)
        if self._engine.rank != 0:
            return
        highest = max(self._losses)
        logger.warning(
            "step %d: the loss jumped to %.4f; the highest of the last steps was %.4f", step.index + 1, loss, highest
        )
        with self._path.open("a") as file:
            file.write(
                json.dumps({"step": step.index + 1, "loss": loss, "highest": highest, "samples": samples}) + "\n"
            )

    def _samples(self, step: Step) -> list[str]:
        """The ids of the global batch, without rows of weight 0."""
        own = [
            name
            for batch in step.batches
            for name, source in zip(batch.sample_ids, batch.sources, strict=True)
            if source >= 0
        ]
        return self._engine.all_gather(own)
