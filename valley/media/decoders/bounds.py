"""What one file may ask of the decoder process."""

from __future__ import annotations

from typing import NamedTuple

from .problems import Problem


class Bounds(NamedTuple):
    """The part of `valley.media.limits.Limits` that is kept where files are opened."""

    max_pixels: int
    max_aspect_ratio: float = float("inf")

    def check_size(self, width: int, height: int) -> None:
        """Refuses pictures of too many pixels, and strips that no square can be cut out of.

        Raises:
            Problem: the pictures are too large or too long.
        """
        if width * height > self.max_pixels:
            raise Problem("limit", f"pictures of {width}x{height} pixels, more than {self.max_pixels} in all")
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise Problem("limit", f"strips of {width}x{height} pixels, longer than 1:{self.max_aspect_ratio:g}")
