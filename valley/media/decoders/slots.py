"""Pictures in memory that both processes see.

The child writes pictures in turn into a few slots of a nameless file that both have mapped, and does not touch a slot again
before the parent has said that it is done with it. So a picture is copied once, and few stand in memory at a time.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
from numpy.typing import NDArray

SLOTS = 2


class SlotWriter:
    """The child's side.

    Attributes:
        unread: pictures placed that the parent is not done with.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None
        self._slot_bytes = 0
        self._next = 0
        self.unread = 0

    def must_wait(self, picture: NDArray[np.uint8]) -> bool:
        """Whether the parent must be done with more pictures before this one finds a place."""
        return self.unread >= (SLOTS if picture.nbytes <= self._slot_bytes else 1)

    def place(self, picture: NDArray[np.uint8]) -> int:
        """Copies a picture into the next slot and returns where in the file it begins."""
        if picture.nbytes > self._slot_bytes:
            self._slot_bytes = picture.nbytes
            os.ftruncate(self._descriptor, SLOTS * self._slot_bytes)
            self._map = mmap.mmap(self._descriptor, SLOTS * self._slot_bytes)
        assert self._map is not None
        offset = self._next * self._slot_bytes
        np.copyto(_view(self._map, offset, picture.shape), picture)
        self._next = (self._next + 1) % SLOTS
        self.unread += 1
        return offset


class SlotReader:
    """The parent's side."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def picture(self, offset: int, height: int, width: int) -> NDArray[np.uint8]:
        """Returns the picture `[H, W, 3]` that begins there, as a view: it changes when the child is told to go on."""
        if self._map is None or offset + height * width * 3 > len(self._map):
            self._map = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return _view(self._map, offset, (height, width, 3))


def _view(memory: mmap.mmap, offset: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.frombuffer(memory, np.uint8, int(np.prod(shape)), offset).reshape(shape)
