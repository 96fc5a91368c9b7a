"""Going on: from the newest complete checkpoint of the run folder, as if nothing had happened."""

from __future__ import annotations

import logging

from valley.checkpoints import store
from valley.errors import CheckpointError
from valley.training.engines import Engine
from valley.training.job import Job
from valley.training.loop import FitResult
from valley.training.meter import Totals

logger = logging.getLogger(__name__)


def take_over(job: Job, engine: Engine) -> FitResult:
    """Puts the engine where the newest complete checkpoint stands; all ranks call it.

    Rank 0 lists them, so that all agree while another process may be writing or pruning; every rank then compares its
    part of the files with their hashes.

    Returns:
        What was known of the run then; its number of steps is the step to go on with. A new run's is 0.

    Raises:
        CheckpointError: on all ranks, when one of them cannot read it.
    """
    listed = engine.all_gather([store.complete(job.checkpoints)] if engine.rank == 0 else [])[0]
    chosen = next((checkpoint for checkpoint in listed if _is_whole(checkpoint, engine)), None)
    if chosen is None:
        return FitResult()
    engine.load([chosen.rank_folder(rank) for rank in range(chosen.world_size)])
    if engine.rank == 0:
        logger.info("going on after step %d, from %s", chosen.step, chosen.path)
    known = chosen.info["result"]
    return FitResult(**{**known, "totals": Totals(**known["totals"])})


def _is_whole(checkpoint: store.Checkpoint, engine: Engine) -> bool:
    """Whether all ranks found their parts of a checkpoint as they were written."""
    damaged = False
    try:
        store.verify(checkpoint, part=engine.rank, parts=engine.world_size)
    except (CheckpointError, OSError) as error:
        damaged = True
        logger.warning("checkpoint passed over: %s", error)
    return engine.all_reduce_sum([float(damaged)]) == [0.0]
