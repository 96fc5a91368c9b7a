"""Writes checkpoints behind the training: what they hold is copied, then written while the next steps are taken.

    start   rank 0 clears the folder; each rank's files are written and hashed by a thread of its own
    …       rank 0's thread sees the hashes of all ranks appear and writes the manifest: the checkpoint is complete
    finish  all ranks learn whether it is; the next `start` does it first

Nothing is lost by dying in between: without its manifest the folder counts for nothing, and the checkpoint before it is
still there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from valley.checkpoints import store
from valley.checkpoints.places import Place
from valley.errors import CheckpointError

_LOOK_EVERY_S = 0.05, 2.0
"""Seconds between two looks for the other ranks' hashes, at first and at last: every look may be a request."""


class _Pending(NamedTuple):
    folder: Place
    files: Future[None]
    manifest: Future[None]
    given_up: threading.Event


class Writer:
    """Writes one checkpoint at a time; every rank has one, and calls it at the same steps.

    Args:
        root: where all checkpoints of the run lie, the same storage for every rank.
        rank: this rank.
        world_size: number of ranks.
        agree: returns on all ranks whether it was given True on all ranks, and is thereby a barrier.
        completed: is called on rank 0's thread when a checkpoint is complete.
    """

    def __init__(
        self,
        root: Place,
        *,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[bool], bool] = bool,
        completed: Callable[[], object] = bool,
    ) -> None:
        self._root, self._rank, self._world_size = root, rank, world_size
        self._agree, self._completed = agree, completed
        self._pending: _Pending | None = None

    def start(self, step: int, write_files: Callable[[Path], None], info: Mapping[str, Any]) -> Place | None:
        """Begins to write a checkpoint, after the one before is finished.

        Args:
            step: optimizer steps taken so far.
            write_files: writes this rank's files into the folder it is given, on another thread.
            info: what the manifest says besides (rank 0's counts); must fit JSON.

        Returns:
            The folder of the checkpoint before, complete; None when there was none to finish.

        Raises:
            CheckpointError: on all ranks, when one of them could not write this or the one before.
        """
        before = self.finish()
        folder = store.folder_of(self._root, step)
        self._together(folder, lambda: store.clear(folder) if self._rank == 0 else None)
        given_up = threading.Event()
        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        files = thread.submit(store.write_rank, folder, self._rank, write_files)
        manifest = thread.submit(self._complete, folder, step, info, given_up)
        thread.shutdown(wait=False)
        self._pending = _Pending(folder, files, manifest, given_up)
        return before

    def finish(self) -> Place | None:
        """Waits for the checkpoint that is being written; all ranks call it.

        Returns:
            Its folder, complete; None when none is being written.

        Raises:
            CheckpointError: on all ranks, when one of them could not write.
        """
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            self._together(pending.folder, pending.files.result)
            self._together(pending.folder, pending.manifest.result)
        finally:
            pending.given_up.set()
        return pending.folder

    def _complete(self, folder: Place, step: int, info: Mapping[str, Any], given_up: threading.Event) -> None:
        """Writes the manifest as soon as all ranks have written their files; rank 0 does."""
        if self._rank != 0:
            return
        wait_s, longest_s = _LOOK_EVERY_S
        while not store.all_written(folder, self._world_size):
            if given_up.wait(wait_s):
                return
            wait_s = min(2 * wait_s, longest_s)
        store.write_manifest(folder, step, self._world_size, info)
        self._completed()

    def _together(self, folder: Place, work: Callable[[], object]) -> None:
        """Does this rank's part, then waits for the others; one rank's failure is an error on all, not a hang."""
        done = False
        try:
            work()
            done = True
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: not written: {error}") from error
        finally:
            all_done = self._agree(done)
        if not all_done:
            raise CheckpointError(f"{folder}: not written: another rank failed")
