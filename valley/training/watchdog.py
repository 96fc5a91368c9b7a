"""A worker that is stuck ends itself, so that the others learn of it and the run goes on from its last checkpoint.

A collective whose other side never comes, a storage mount that hangs, a deadlock: none of them raises anything.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

STUCK = 75
"""Exit status of a process that ended itself (EX_TEMPFAIL: trying again may help)."""
STDERR = 2
"""Its file descriptor; Python's object for it may be replaced, or locked by a thread that is stuck in it."""
LAST_WORDS_S = 3.0
"""Seconds to tell where the threads stood before the process ends."""


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
        """Tells where the threads stand, as far as that can be told in time, and ends the process whatever happens."""
        try:
            stacks = _stacks()
            # What hangs may be the disk, the log or the other end of a pipe. Each gets a thread, none can stop the end.
            tellers = [
                threading.Thread(target=self._report.write_text, args=(stacks,), daemon=True),
                threading.Thread(target=self._say, args=(patience_s, stacks), daemon=True),
            ]
            for teller in tellers:
                teller.start()
            give_up_s = time.monotonic() + LAST_WORDS_S
            for teller in tellers:
                teller.join(max(0.0, give_up_s - time.monotonic()))
        finally:
            os._exit(STUCK)

    def _say(self, patience_s: float, stacks: str) -> None:
        os.write(STDERR, stacks.encode())
        logger.critical(
            "nothing was done for %g s (cluster.stuck_after_s): this worker ends itself; where each of its threads "
            "stood is above, and in %s if that could be written",
            patience_s,
            self._report,
        )
        logging.shutdown()


def _stacks() -> str:
    """Where every thread stands, innermost call first.

    `faulthandler` would hold the interpreter's lock while it writes, and with it the whole process if the writing
    hangs; `traceback`, left to itself, would read source files.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"Thread {ident} ({names.get(ident, 'unknown')}):")
        for called, line in traceback.walk_stack(frame):
            code = called.f_code
            lines.append(f'  File "{code.co_filename}", line {line}, in {code.co_qualname}')
    return "\n".join(lines) + "\n"
