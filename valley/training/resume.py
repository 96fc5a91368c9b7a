"""Going on: from the newest complete checkpoint of the run folder, as if nothing had happened."""

from __future__ import annotations

import logging

from valley.checkpoints import store
from valley.training.engines import Engine
from valley.training.job import Job
from valley.training.loop import FitResult
from valley.training.meter import Totals

logger = logging.getLogger(__name__)


def take_over(job: Job, engine: Engine) -> FitResult:
    """Puts the engine where the newest complete checkpoint stands; all ranks call it.

    Rank 0 chooses, so that all agree while another process may be writing or pruning.

    Returns:
        What was known of the run then; its number of steps is the step to go on with. A new run's is 0.

    Raises:
        CheckpointError: on all ranks, when one of them cannot read it.
    """
    newest = store.newest_complete(job.checkpoints) if engine.rank == 0 else None
    chosen = engine.all_gather([newest] if engine.rank == 0 else [])[0]
    if chosen is None:
        return FitResult()
    engine.load([chosen.rank_folder(rank) for rank in range(chosen.world_size)])
    if engine.rank == 0:
        logger.info("going on after step %d, from %s", chosen.step, chosen.path)
    known = chosen.info["result"]
    return FitResult(**{**known, "totals": Totals(**known["totals"])})
