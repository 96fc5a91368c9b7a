"""Child processes that open and decode media files for us, and are killed when they misbehave.

A process is kept for the next file, so starting it is paid for once. A call has one to itself: threads that read at the
same time use as many processes. `valley.media.decoders` is what runs in there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from valley.errors import (
    DamagedMediaError,
    DecoderDiedError,
    DecodeTimeoutError,
    EmptyMediaError,
    MediaLimitError,
    MissingMediaError,
    SettingsError,
    UnsupportedMediaError,
)
from valley.media.decoders.isolation import Isolation
from valley.media.decoders.slots import SlotReader
from valley.media.decoders.wire import GoneError, Wire
from valley.media.limits import Limits

_START_S = 60.0
"""Patience with a process that starts; it takes a fraction of a second where nothing else goes on."""
_MOST_IDLE = os.cpu_count() or 1
"""Processes kept for later calls."""
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # Keep the memory of a picture for the next one: asking the system for it each time costs 6 % of a decode.
    "MALLOC_MMAP_THRESHOLD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}
_PROBLEMS = {
    "missing": MissingMediaError,
    "empty": EmptyMediaError,
    "unsupported": UnsupportedMediaError,
    "damaged": DamagedMediaError,
    "limit": MediaLimitError,
}
_BOOT = """
import json, sys, types
sys.path[:] = json.loads(sys.argv[1])
for name, folder in json.loads(sys.argv[2]).items():  # the packages above the child's, without running them
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from valley.media.decoders.child import main
main(*map(int, sys.argv[3:]))
"""


class Reading:
    """A file that a child process has open.

    Attributes:
        name: the file, as error messages call it.
        process_id: of the child.
        info: what it is: the fields of `valley.media.probe.MediaInfo`.
        times_s: when each frame is shown, in seconds from the first.
        lost: positions of frames that damage touches; known when `pictures` has ended.
        notes: what is unusual; complete when `pictures` has ended.
    """

    def __init__(self, name: str, child: _Child, limits: Limits) -> None:
        self.name, self._child = name, child
        self.process_id = child.pid
        self._deadline_s, self._deadline_s_per_frame = limits.deadline_s, limits.deadline_s_per_frame
        self._ends_at = time.monotonic() + limits.deadline_s
        self.info: dict[str, Any] = {}
        self.times_s: NDArray[np.float64] = np.zeros(0)
        self.lost: set[int] = set()
        self.notes: list[str] = []

    def open(self, request: dict[str, Any]) -> None:
        """Has the child open the file and say what it is."""
        self._child.is_idle = False
        self._send(request)
        answer, block = self._receive()
        self._child.is_idle = not request["frames"]
        self.info, self.notes = answer["info"], answer["notes"]
        self.times_s = np.frombuffer(block, np.float64)

    def pictures(self, positions: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yields (position, upright RGB frame `[H, W, 3]`) for each of `positions` that can be decoded, in any order.

        A frame is a view of memory that is used again. One whose position is `lost` in the end is damaged.
        """
        more_s = self._deadline_s_per_frame * len(positions)
        self._deadline_s, self._ends_at = self._deadline_s + more_s, self._ends_at + more_s
        self._send({"positions": list(positions)})
        while True:
            answer, _ = self._receive()
            for position, offset, height, width in answer["pictures"]:
                yield position, self._child.slots.picture(offset, height, width)
            if "notes" in answer:
                break
            self._send({})
        self._child.is_idle = True
        self.lost.update(answer["lost"])
        self.notes += answer["notes"]

    def _send(self, message: dict[str, Any]) -> None:
        with self._watched():
            self._child.wire.send(message)

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        with self._watched():
            answer, block = self._child.wire.receive()
        if "problem" in answer or "errno" in answer:
            self._child.is_idle = True
            self._raise(answer)
        return answer, block

    def _raise(self, answer: dict[str, Any]) -> None:
        if "errno" in answer:
            raise OSError(answer["errno"], answer["reason"], self.name)
        if answer["problem"] == "settings":
            raise SettingsError([answer["reason"]])
        raise _PROBLEMS[answer["problem"]](self.name, answer["reason"])

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        self._child.wire.set_timeout(max(self._ends_at - time.monotonic(), 1e-3))
        try:
            yield
        except TimeoutError:
            raise DecodeTimeoutError(self.name, f"not decoded within {self._deadline_s:g} s") from None
        except GoneError:
            raise DecoderDiedError(self.name, f"the decoder process died: {self._child.end()}") from None


@contextlib.contextmanager
def reading(source: str | Path | bytes, limits: Limits, *, decoder: str, frames: bool) -> Iterator[Reading]:
    """Has a child process open a file; the process is used again, or killed if it has not come to an end by itself.

    Args:
        source: a path, or the bytes of a file.
        limits: what it may cost. The deadline runs from here to the end of the block, and `pictures` puts it off.
        decoder: which library decodes, see `valley.media.decode`.
        frames: whether `pictures` will be asked for; otherwise only the header is read.

    Raises:
        MediaError: the file cannot be used, now or inside the block.
        OSError: the storage failed.
    """
    name = f"<{len(source)} bytes>" if isinstance(source, bytes) else str(source)
    child = _pool.take()
    try:
        if isinstance(source, bytes):
            child.fill_inbox(source)
        file = Reading(name, child, limits)
        file.open(
            {
                "path": None if isinstance(source, bytes) else os.path.abspath(source),  # noqa: PTH100 - links stay as they are
                "decoder": decoder,
                "frames": frames,
                **limits.model_dump(exclude={"deadline_s", "deadline_s_per_frame"}),
            }
        )
        yield file
    finally:
        _pool.give_back(child)


class _Child:
    """A decoder process, ready for requests.

    Attributes:
        wire: the parent's end of the socket.
        slots: where its pictures appear.
        is_idle: it waits for a request.
        isolation: how it is kept from the network.
    """

    def __init__(self) -> None:
        end, childs_end = socket.socketpair()
        self.wire = Wire(end)
        self._pictures, self._inbox = _nameless_file(), _nameless_file()
        self.slots = SlotReader(self._pictures)
        descriptors = (childs_end.fileno(), self._pictures, self._inbox)
        media = Path(__file__).parent
        packages = {"valley": str(media.parent), "valley.media": str(media)}
        with childs_end:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", "-c", _BOOT),
                    *(json.dumps([entry for entry in sys.path if entry]), json.dumps(packages)),
                    *map(str, descriptors),
                ],
                stdin=subprocess.PIPE,  # its end tells the child that its parent is gone
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                env=os.environ | _ENVIRONMENT,
            )
        self.wire.set_timeout(_START_S)
        try:
            self.isolation: Isolation = self.wire.receive()[0]["isolation"]
        except (GoneError, TimeoutError):
            self.kill()
            raise RuntimeError(f"the decoder process did not start: {self.end()}") from None
        self.is_idle = True

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self) -> str:
        """How the process ended; waits for it."""
        status = self._process.wait()
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def fill_inbox(self, data: bytes) -> None:
        """Puts the bytes of a file where the process finds them."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.pwrite(self._inbox, rest, len(data) - len(rest)) :]

    def empty_inbox(self) -> None:
        """Frees the memory of the inbox."""
        os.ftruncate(self._inbox, 0)

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        self.forget()

    def forget(self) -> None:
        """Closes this side."""
        self.wire.close()
        for descriptor in (self._pictures, self._inbox):
            os.close(descriptor)
        if self._process.stdin is not None:
            self._process.stdin.close()


class _Pool:
    """The processes there are: those at work, and those kept for later calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()

    def children(self) -> list[_Child]:
        with self._lock:
            return [*self._idle, *self._busy]

    def take(self) -> _Child:
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.is_alive:
                    self._busy.add(child)
                    return child
                child.kill()
        child = _Child()
        with self._lock:
            self._busy.add(child)
        return child

    def give_back(self, child: _Child) -> None:
        with self._lock:
            self._busy.discard(child)
            if child.is_idle and child.is_alive and len(self._idle) < _MOST_IDLE:
                child.empty_inbox()
                self._idle.append(child)
                return
        child.kill()

    def forget_all(self) -> None:
        """In a forked process: the children are the parent's."""
        self._lock = threading.Lock()  # some thread of the parent may have held it
        for child in self._empty():
            child.forget()

    def kill_all(self) -> None:
        for child in self._empty():
            child.kill()

    def _empty(self) -> list[_Child]:
        children = self.children()
        self._idle.clear()
        self._busy.clear()
        return children


_pool = _Pool()


def isolation() -> Isolation:
    """Returns how decoder processes are kept from the network; starts one if there is none to ask.

    `namespace`: they have none. `protocols`: the system does not allow that (many containers, other systems than
    Linux), and they merely open files without any of FFmpeg's protocols.
    """
    child = _pool.take()
    try:
        return child.isolation
    finally:
        _pool.give_back(child)


def process_ids() -> list[int]:
    """Returns the ids of the decoder processes there are."""
    return [child.pid for child in _pool.children()]


def _nameless_file() -> int:
    """A file in memory where the system has that, else on disk, that is gone when nobody has it open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("valley")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


os.register_at_fork(after_in_child=_pool.forget_all)
atexit.register(_pool.kill_all)
