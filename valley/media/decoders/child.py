"""The decoder process: reads one file after the other for its parent, and may be killed at any moment.

It first cuts itself off from the network, and says how in {"ready": true, "isolation": …}.

A request names a file, the limits and the decoder. The child answers with what the file is; then, unless just that was
asked for, with the pictures at the positions that the parent chooses from the times it was told:

    parent                                child
    {"path", "decoder", …}         ->
                                   <-     {"info": {…}, "notes": […]}, times of all pictures
    {"positions": […]}             ->
                                   <-     {"pictures": [[position, offset, height, width], …]}
    {}: done with those            ->
                                   <-     {"pictures": […], "lost": [position, …], "notes": […]}: the end

In place of any answer it may say {"problem": kind, "reason"} or {"errno", "reason"} and await the next request.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from .bounds import Bounds
from .clip import Clip
from .containers import HEAD_BYTES, Container, recognise
from .isolation import leave_network
from .memory import memory_bounded
from .problems import Problem, UnfitError
from .pyav import read_pyav
from .slots import SlotWriter
from .wire import GoneError, Wire

Pixels = NDArray[np.uint8]
Reader = Callable[[Clip, Sequence[int]], Iterator[tuple[int, Pixels | None]]]


def main(end: int, pictures: int, inbox: int) -> None:
    """Serves until the parent is gone.

    Args:
        end: descriptor of this end of the socket.
        pictures: descriptor of the file that pictures are written to.
        inbox: descriptor of the file that holds the media when a request names no path.
    """
    isolation = leave_network()
    _die_with_parent()
    wire = Wire(socket.socket(fileno=end))
    server = _Server(wire, SlotWriter(pictures), inbox)
    wire.send({"ready": True, "isolation": isolation})
    with contextlib.suppress(GoneError):
        while True:
            request, _ = wire.receive()
            server.serve(request)


def _die_with_parent() -> None:
    """Standard input is a pipe that the parent holds open and never writes to."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with contextlib.suppress(OSError):  # if memory runs out, this process goes first
        Path("/proc/self/oom_score_adj").write_text("500")


class _Server:
    def __init__(self, wire: Wire, slots: SlotWriter, inbox: int) -> None:
        self._wire, self._slots, self._inbox = wire, slots, inbox

    def serve(self, request: dict[str, Any]) -> None:
        """Answers one request, whatever becomes of it."""
        try:
            with (
                memory_bounded(request["max_memory_bytes"]),
                self._open(request["path"], request["max_bytes"]) as file,
            ):
                self._read(file, request)
        except Problem as problem:
            self._wire.send({"problem": problem.kind, "reason": problem.reason})
        except MemoryError:
            most = request["max_memory_bytes"]
            self._wire.send({"problem": "limit", "reason": f"more memory needed than {most} bytes"})
        except GoneError:
            raise
        except av.FFmpegError as error:
            self._wire.send({"problem": "damaged", "reason": f"cannot be decoded: {error.strerror}"})
        except OSError as error:
            self._wire.send({"errno": error.errno or errno.EIO, "reason": error.strerror or type(error).__name__})
        except Exception as error:  # noqa: BLE001 - the rim: what a decoder makes of a broken file has no bounds
            # Its text stays here: it may hold addresses in memory, and reasons are shown to strangers.
            self._wire.send({"problem": "damaged", "reason": f"cannot be decoded ({type(error).__name__})"})

    def _open(self, path: str | None, max_bytes: int) -> FileIO:
        file = FileIO(self._inbox, closefd=False) if path is None else _open_regular(path)
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise Problem("empty", "zero bytes")
        if size > max_bytes:
            raise Problem("limit", f"{size} bytes, more than {max_bytes}")
        return file

    def _read(self, file: FileIO, request: dict[str, Any]) -> None:
        container = recognise(os.pread(file.fileno(), HEAD_BYTES, 0))
        bounds = Bounds(**{name: request[name] for name in Bounds._fields})
        if container.kind == "image":
            self._read_still(file, container, bounds, request)
        else:
            self._read_clip(file, container, bounds, request)

    def _read_still(self, file: FileIO, container: Container, bounds: Bounds, request: dict[str, Any]) -> None:
        from .still import Still  # Pillow is not loaded for videos

        still = Still(file, container, bounds=bounds)
        self._wire.send({"info": still.info(), "notes": still.notes}, np.zeros(1).tobytes())
        if request["frames"]:
            self._wire.receive()  # there is just one position to ask for
            self._show(iter([(0, still.pixels())]), [])

    def _read_clip(self, file: FileIO, container: Container, bounds: Bounds, request: dict[str, Any]) -> None:
        with contextlib.closing(Clip(file, container, bounds=bounds)) as clip:
            if not request["frames"]:
                info = clip.stated_info()
                bounds.check_length(info["duration_s"])
                self._wire.send({"info": info, "notes": []})
                return
            clip.scan()
            if clip.cut and request["damaged"] == "reject":
                raise Problem("damaged", clip.cut)
            bounds.check_length(clip.duration_s)
            self._wire.send({"info": clip.info(), "notes": [clip.cut] if clip.cut else []}, clip.times_s.tobytes())
            positions = self._wire.receive()[0]["positions"]
            notes: list[str] = []
            self._show(_pictures(clip, positions, request["decoder"], notes), notes)

    def _show(self, pictures: Iterator[tuple[int, Pixels | None]], notes: list[str]) -> None:
        """Tells the parent of the pictures, as many at a time as there is room for."""
        self._slots.start_again()
        placed: list[tuple[int, int, int, int]] = []
        lost: list[int] = []
        for position, pixels in pictures:
            if pixels is None:
                lost.append(position)
                continue
            if not self._slots.has_room(pixels):
                self._wire.send({"pictures": placed})
                self._wire.receive()
                self._slots.start_again(pixels)
                placed = []
            height, width, _ = pixels.shape
            placed.append((position, self._slots.place(pixels), height, width))
        self._wire.send({"pictures": placed, "lost": lost, "notes": notes})


def _open_regular(path: str) -> FileIO:
    """Opens a file without ever waiting for one: a pipe would have the child wait for its writer."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise Problem("missing", "no such file") from error
    except PermissionError as error:
        raise Problem("missing", "may not be read: permission denied") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise Problem("missing", f"no file: {error.strerror}") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Problem("unsupported", "not a regular file")
    return FileIO(descriptor)


def _reader(decoder: str) -> Reader:
    try:
        reader: Reader = import_module(f".{decoder}", __package__).read
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken installation may raise anything, and no file is to blame
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Problem("settings", f"decoder: {decoder} cannot be loaded: {reason}") from None
    return reader


def _pictures(
    clip: Clip, positions: Sequence[int], decoder: str, notes: list[str]
) -> Iterator[tuple[int, Pixels | None]]:
    """Yields the pictures by the decoder asked for, and those it is no good for by PyAV, with a note."""
    left = set(positions)
    if decoder not in ("auto", "pyav"):
        read = _reader(decoder)
        try:
            for position, pixels in read(clip, positions):
                left.discard(position)
                yield position, pixels
        except UnfitError as unfit:
            notes.append(f"read by pyav, since {decoder} is not right for {unfit}")
    if left:
        yield from read_pyav(clip, sorted(left))
