"""Setting the standardisation of a new model (spec section 3): once, from the first training samples."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from valley.checkpoints.standardisation import read_moments, write_moments
from valley.data.collate import frames_tensor
from valley.data.loading import Loader
from valley.errors import SettingsError
from valley.model.vision import Moments
from valley.training.engines import Engine
from valley.training.job import Job

logger = logging.getLogger(__name__)

NUM_SAMPLES = 64
"""Training samples that are looked at, the first in the order of the slots."""
_SMALLEST_STD = 1e-6


def standardise(job: Job, engine: Engine) -> None:
    """Sets the model's standardisation when the settings ask for it and the model is new; all ranks call it.

    A blind run, which has no pictures, does without.

    What was measured is kept in the run folder: a run that goes on has the very same numbers, on whatever machine. A
    saved model brings its own and keeps it.

    Raises:
        SettingsError: on all ranks, when none of the first samples has a picture.
    """
    settings = job.settings.model
    if not settings.vision.standardise or settings.path is not None or job.settings.data.blind:
        return
    known = engine.all_gather([read_moments(job.folder)] if engine.rank == 0 else [])[0]
    measured = None
    # A tower that is shared out over the ranks (ZeRO-3) runs on all of them or on none.
    if known is None and (engine.rank == 0 or not engine.replicates_weights):
        measured = _measure(job.loader, engine)
    moments = known or engine.all_gather([measured] if engine.rank == 0 else [])[0]
    if moments is None:
        raise SettingsError(
            [f"model.vision.standardise: none of the first {NUM_SAMPLES} training samples has a picture to measure"]
        )
    if engine.rank == 0 and known is None:
        logger.info("the tower's output is standardised as measured on the first %d samples", NUM_SAMPLES)
        write_moments(job.folder, moments)
    engine.model.standardisation.set_moments(moments)


@torch.no_grad()
def _measure(loader: Loader, engine: Engine) -> Moments | None:
    """Measures the tower's patch tokens on the first samples; None when they have no pictures."""
    width, count = engine.model.config.vision_config.hidden_size, 0
    total, squares = torch.zeros(2, width, dtype=torch.float64)
    with engine.inference():
        for slot in range(NUM_SAMPLES):
            frames = loader.load(slot).frames
            if len(frames):
                tokens = _patches(engine, frames_tensor(frames).to(engine.device))
                total += tokens.sum(0)
                squares += tokens.square().sum(0)
                count += len(tokens)
    if not count:
        return None
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    # A channel that never changes has nothing to be divided by.
    std = torch.where(std > _SMALLEST_STD, std, 1.0)
    return {"mean": mean.tolist(), "std": std.tolist()}


def _patches(engine: Engine, frames: Tensor) -> Tensor:
    """Returns all patch tokens of some pictures or of the tower's tokens, `[F * P, D]`, in float64 on the CPU."""
    tokens = engine.model.encode_frames(frames) if frames.dtype == torch.uint8 else frames
    return tokens[:, 1:].flatten(0, 1).double().cpu()
