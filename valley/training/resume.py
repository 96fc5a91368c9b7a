"""Going on: from the newest complete checkpoint of the run folder, as if nothing had happened."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

from valley.checkpoints import store
from valley.checkpoints.frozen import FrozenPart
from valley.checkpoints.standardisation import read_moments, write_moments
from valley.errors import CheckpointError
from valley.training.engines import Engine
from valley.training.job import Job
from valley.training.loop import FitResult
from valley.training.meter import Totals

logger = logging.getLogger(__name__)

T = TypeVar("T")


def take_over(job: Job, engine: Engine, frozen: Mapping[str, FrozenPart]) -> FitResult:
    """Puts the engine where the newest complete checkpoint stands; all ranks call it.

    Rank 0 lists them, so that all agree while another process may be writing or pruning; every rank then compares its
    part of the files with their hashes. What the run folder has lost of the standardisation comes from the checkpoint.

    Args:
        job: the run.
        engine: takes weights, optimizer state and random numbers over.
        frozen: the parts that do not train, as they were loaded now; rank 0's are looked at.

    Returns:
        What was known of the run then; its number of steps is the step to go on with. A new run's is 0.

    Raises:
        CheckpointError: on all ranks, when storage fails, no checkpoint is whole, or a frozen part is another.
    """
    listed = _from_rank_0(engine, lambda: store.complete(job.checkpoints))
    damaged: list[store.Checkpoint] = []
    for checkpoint in listed:
        if _is_whole(checkpoint, engine):
            break
        damaged.append(checkpoint)
    else:
        if not listed:
            return FitResult()
        raise CheckpointError(f"{job.checkpoints}: none of {len(listed)} checkpoint(s) is whole")
    _from_rank_0(engine, lambda: _settle(job, checkpoint, damaged, frozen))
    engine.load([checkpoint.rank_folder(rank) for rank in range(checkpoint.world_size)])
    if engine.rank == 0:
        logger.info("going on after step %d, from %s", checkpoint.step, checkpoint.path)
    known = checkpoint.info["result"]
    return FitResult(**{**known, "totals": Totals(**known["totals"])})


def _is_whole(checkpoint: store.Checkpoint, engine: Engine) -> bool:
    """Whether all ranks found their parts of a checkpoint as they were written.

    Raises:
        CheckpointError: on all ranks, when one of them could not look: that says nothing of the checkpoint.
    """
    damaged = unread = False
    try:
        store.verify(checkpoint, part=engine.rank, parts=engine.world_size)
    except CheckpointError as error:
        damaged = True
        logger.warning("checkpoint passed over: %s", error)
    except OSError as error:
        unread = True
        logger.error("checkpoint not read: %s", error)
    num_damaged, num_unread = engine.all_reduce_sum([float(damaged), float(unread)])
    if num_unread:
        raise CheckpointError(f"{checkpoint.path}: could not be read by {num_unread:.0f} worker(s); try again")
    return not num_damaged


def _settle(
    job: Job, checkpoint: store.Checkpoint, damaged: Sequence[store.Checkpoint], frozen: Mapping[str, FrozenPart]
) -> None:
    """Looks whether the rest is what it was, and sees to it that damaged checkpoints count no more."""
    for part, before in checkpoint.info["frozen"].items():
        if part not in frozen or frozen[part].sha256 != before["sha256"]:
            raise CheckpointError(
                f"{checkpoint.path}: the frozen part {part!r} ({before['source']}) is not what the run began with"
            )
    for other in damaged:
        store.disown(other.path)
    moments = checkpoint.info.get("standardisation")
    if moments and read_moments(job.folder) is None:
        write_moments(job.folder, moments)


def _from_rank_0(engine: Engine, work: Callable[[], T]) -> T:
    """What rank 0 found, on all ranks; so is its error.

    Raises:
        CheckpointError: storage failed, or `work` raised it.
    """
    found: list[tuple[T | None, str | None]] = []
    if engine.rank == 0:
        try:
            found = [(work(), None)]
        except (OSError, CheckpointError) as error:
            found = [(None, str(error))]
    result, problem = engine.all_gather(found)[0]
    if problem is not None:
        raise CheckpointError(problem)
    return cast("T", result)
