"""Pictures in memory that both processes see.

The child writes pictures one behind the other into a nameless file that both have mapped. When there is no room for the
next one, it waits until the parent is done with them all, and starts at the beginning. So a picture is copied once, few
stand in memory at a time, and the two processes seldom wake each other up, which costs more than all else between them.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
from numpy.typing import NDArray

ROUND_BYTES = 8 << 20
"""Pictures that stand in memory at a time; a larger one stands there alone."""


class SlotWriter:
    """The child's side."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = self._mapped(ROUND_BYTES)
        self._used = 0

    def has_room(self, picture: NDArray[np.uint8]) -> bool:
        """Whether the picture fits behind those that the parent may still be looking at."""
        return self._used + picture.nbytes <= len(self._map)

    def start_again(self, picture: NDArray[np.uint8] | None = None) -> None:
        """Forgets the pictures so far, and makes room for at least this one."""
        self._used = 0
        if picture is not None and picture.nbytes > len(self._map):
            self._map = self._mapped(picture.nbytes)

    def place(self, picture: NDArray[np.uint8]) -> int:
        """Copies a picture there and returns where it begins."""
        offset, self._used = self._used, self._used + picture.nbytes
        np.copyto(_view(self._map, offset, *picture.shape[:2]), picture)
        return offset

    def _mapped(self, size: int) -> mmap.mmap:
        os.ftruncate(self._descriptor, size)
        return mmap.mmap(self._descriptor, size)


class SlotReader:
    """The parent's side."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def picture(self, offset: int, height: int, width: int) -> NDArray[np.uint8]:
        """Returns the picture `[H, W, 3]` that begins there, as a view: it changes when the child is told to go on."""
        if self._map is None or offset + height * width * 3 > len(self._map):
            self._map = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return _view(self._map, offset, height, width)


def _view(memory: mmap.mmap, offset: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.frombuffer(memory, np.uint8, height * width * 3, offset).reshape(height, width, 3)
