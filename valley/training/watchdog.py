"""A worker that is stuck ends itself, so that the others learn of it and the run goes on from its last checkpoint.

A collective whose other side never comes, a storage mount that hangs, a deadlock: none of them raises anything.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

STUCK = 75
"""Exit status of a process that ended itself (EX_TEMPFAIL: trying again may help)."""


class Watchdog:
    """Ends the process when nobody has called `beat` for a while; where every thread stood is written down.

    Args:
        patience_s: seconds between two calls; None: it never ends anything.
        report: the file that the stacks of all threads go to.
    """

    def __init__(self, patience_s: float | None, report: Path) -> None:
        self._patience_s, self._report = patience_s, report
        self._beaten_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Says that something was done."""
        self._beaten_s = time.monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._patience_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        patience_s = self._patience_s or 0.0
        while not self._ended.wait(min(patience_s / 4, 10.0)):
            if time.monotonic() - self._beaten_s > patience_s:
                self._end(patience_s)

    def _end(self, patience_s: float) -> None:
        with self._report.open("w") as file:
            faulthandler.dump_traceback(file)
        logger.critical(
            "nothing was done for %g s (cluster.stuck_after_s): this worker ends itself; where each of its threads "
            "stood is in %s",
            patience_s,
            self._report,
        )
        logging.shutdown()
        os._exit(STUCK)
