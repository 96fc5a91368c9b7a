"""How stored pictures are turned and mirrored to be upright."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Orientation(NamedTuple):
    """What makes a stored picture upright: first it is mirrored, then turned.

    Attributes:
        rotation: degrees counter-clockwise: 0, 90, 180 or 270.
        mirrored: left and right change places, before the turn.
    """

    rotation: int = 0
    mirrored: bool = False

    def upright(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the stored picture `[H, W, 3]` upright, as a view."""
        return np.rot90(pixels[:, ::-1] if self.mirrored else pixels, self.rotation // 90)


def of_angle(degrees: float, *, mirrored: bool = False) -> Orientation:
    """Returns the orientation of a turn, to the nearest quarter."""
    return Orientation(round(degrees / 90) % 4 * 90 if math.isfinite(degrees) else 0, mirrored)


def of_matrix(a: int, b: int, c: int, d: int) -> Orientation:
    """Returns the orientation of a display matrix, which shows the pixel (x, y) at (a x + c y, b x + d y)."""
    mirrored = a * d - b * c < 0
    if mirrored:  # what is left after mirroring is a turn
        a, b = -a, -b
    return of_angle(math.degrees(math.atan2(-b, a)), mirrored=mirrored)
