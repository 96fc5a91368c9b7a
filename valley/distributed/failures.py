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
_FILE, _FILES = "failure-{}.pickle", "failure-*.pickle"


def forget_failure(folder: Path) -> None:
    """Removes what an earlier run has left in the run folder."""
    for path in folder.glob(_FILES):
        path.unlink()


def read_failure(folder: Path) -> ValleyError | None:
    """Returns the final error that the lowest rank to have one left in the run folder; None: there is none."""
    for path in sorted(folder.glob(_FILES)):
        error: ValleyError = pickle.loads(path.read_bytes())
        return error
    return None


def end_together(
    work: Callable[[], object], folder: Path, *, rank: int, world_size: int, patience_s: float = PATIENCE_S
) -> None:
    """Runs a rank's work; leaves a final error of it in the run folder, for the process that started the workers.

    When all ranks have such an error, or the workers have been started again after one, each returns as if all were
    well, so that Ray does not start them again. When one rank has it alone, the others may wait for this one in a
    collective: it must raise the error, for Ray to end them.

    Args:
        work: what the rank does.
        folder: the run folder, which all ranks see.
        rank: of this process.
        world_size: how many there are.
        patience_s: seconds until the others count as without an error.

    Raises:
        ValleyError: a final error, which not all ranks have.
    """
    if read_failure(folder):
        return
    try:
        work()
    except FINAL as error:
        logger.error("rank %d cannot go on: %s", rank, error)
        partial = folder / f"{_FILE.format(f'{rank:05d}')}.partial"
        partial.write_bytes(pickle.dumps(error))
        partial.rename(partial.with_suffix(""))
        give_up_s = time.monotonic() + patience_s
        while len(list(folder.glob(_FILES))) < world_size:
            if time.monotonic() > give_up_s:
                raise
            time.sleep(0.1)
