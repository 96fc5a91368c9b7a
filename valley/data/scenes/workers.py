"""Several processes that film scenes.

They are plain child processes and not `multiprocessing`'s: those would import the calling script and, with `valley`
itself, torch and transformers, which takes longer than filming a small set. They need no `__main__` guard either.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from valley.data.scenes.encode import film
from valley.data.scenes.scene import Scene

_ROOT = Path(__file__).parents[2]
_BOOT = """
import json, sys, types
sys.path[:], packages = json.loads(sys.argv[1])
for name, folder in packages.items():  # the packages above ours, without running them
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from valley.data.scenes.workers import work
work()
"""


def film_all(clips: Sequence[tuple[Scene, Path]], workers: int) -> Iterator[Path]:
    """Film scenes in `workers` processes; yields the path of each clip when it is there.

    Raises:
        subprocess.CalledProcessError: a process failed; it has said why on the error stream. The others stop after
            the clip they are at.
    """
    idle: SimpleQueue[_Worker] = SimpleQueue()

    def film_one(scene: Scene, path: Path) -> Path:
        worker = idle.get()
        try:
            worker.film(scene, path)
        finally:
            idle.put(worker)
        return path

    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_Worker()))
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        jobs = [pool.submit(film_one, scene, path) for scene, path in clips]
        try:
            for job in as_completed(jobs):
                yield job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Worker:
    """A process that films what it is sent, one scene at a time."""

    def __enter__(self) -> _Worker:
        packages = {"valley": str(_ROOT), "valley.data": str(_ROOT / "data")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps([sys.path, packages])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # on Ctrl-C it finishes its clip and finds its input closed
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        return self

    def film(self, scene: Scene, path: Path) -> None:
        """Send a scene, and wait until its clip is there."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):  # of a dead process: its exit status tells more
            pickle.dump((scene, path), self._process.stdin)
            self._process.stdin.flush()
        if not self._process.stdout.readline():
            raise subprocess.CalledProcessError(self._process.wait(), "filming a scene")

    def __exit__(self, *_: object) -> None:
        """Let it end."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()


def work() -> None:
    """What such a process runs: film the scenes that come in, say so after each, end with the input."""
    with contextlib.suppress(EOFError):
        while True:
            scene, path = pickle.load(sys.stdin.buffer)
            film(scene, path)
            sys.stdout.write("\n")
            sys.stdout.flush()
