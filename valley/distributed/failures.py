"""Errors that a new start of the workers would only run into again: they end the run, whichever rank has them."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path

from valley.errors import DivergedError, ModelError, RejectLimitError, SettingsError, ValleyError

logger = logging.getLogger(__name__)

FINAL = (SettingsError, ModelError, RejectLimitError, DivergedError)
"""Errors that no new start of the workers would help against."""
PATIENCE_S = 30.0
"""Seconds that a rank with such an error waits for the others to run into theirs."""
_ERROR, _ERRORS = "failure-{}.pickle", "failure-*.pickle"
"""A rank's final error."""
_TOLD, _ALL_TOLD = "failure-{}.told", "failure-*.told"
"""Mark of a rank that did no work, because there was an error before it began."""


def forget_failure(folder: Path) -> None:
    """Removes what an earlier run has left in the run folder."""
    for path in (*folder.glob(_ERRORS), *folder.glob(_ALL_TOLD)):
        path.unlink()


def read_failure(folder: Path) -> ValleyError | None:
    """Returns the final error that the lowest rank to have one left in the run folder; None: there is none."""
    for path in sorted(folder.glob(_ERRORS)):
        error: ValleyError = pickle.loads(path.read_bytes())
        return error
    return None


def end_together(
    work: Callable[[], object], folder: Path, *, rank: int, world_size: int, patience_s: float = PATIENCE_S
) -> None:
    """Runs a rank's work; leaves a final error of it in the run folder, for the process that started the workers.

    A rank that finds such an error before it begins does no work: it was late, or the workers have been started again.
    When all ranks have one or have found one, each returns as if all were well, so that Ray does not start them again.
    When others are at work, they may wait for this rank in a collective: it must raise the error, for Ray to end them.

    Args:
        work: what the rank does.
        folder: the run folder, which all ranks see.
        rank: of this process.
        world_size: how many there are.
        patience_s: seconds until the others count as being at work.

    Raises:
        ValleyError: a final error, while other ranks are at work.
    """
    number = f"{rank:05d}"
    if read_failure(folder):
        (folder / _TOLD.format(number)).touch()
        return
    try:
        work()
    except FINAL as error:
        logger.error("rank %d cannot go on: %s", rank, error)
        partial = folder / f"{_ERROR.format(number)}.partial"
        partial.write_bytes(pickle.dumps(error))
        partial.rename(partial.with_suffix(""))
        give_up_s = time.monotonic() + patience_s
        while len({path.stem for pattern in (_ERRORS, _ALL_TOLD) for path in folder.glob(pattern)}) < world_size:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.1)
