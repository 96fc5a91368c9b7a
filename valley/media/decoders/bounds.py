"""What one file may ask of the decoder process."""

from __future__ import annotations

from typing import NamedTuple

from .problems import Problem


class Bounds(NamedTuple):
    """The part of `valley.media.limits.Limits` that is kept where files are opened."""

    max_pixels: int
    max_aspect_ratio: float = float("inf")
    max_duration_s: float = float("inf")
    max_pictures: float = float("inf")

    def check_size(self, width: int, height: int) -> None:
        """Refuses pictures of too many pixels, and strips that no square can be cut out of.

        Raises:
            Problem: the pictures are too large or too long.
        """
        if width * height > self.max_pixels:
            raise Problem("limit", f"pictures of {width}x{height} pixels, more than {self.max_pixels} in all")
        if max(width, height) > self.max_aspect_ratio * min(width, height):
            raise Problem("limit", f"strips of {width}x{height} pixels, longer than 1:{self.max_aspect_ratio:g}")

    def check_length(self, duration_s: float, num_pictures: int = 0) -> None:
        """Refuses clips that are too long.

        Raises:
            Problem: they take too much time or have too many pictures.
        """
        if duration_s > self.max_duration_s:
            raise Problem("limit", f"{duration_s:.1f} s long or more, the most being {self.max_duration_s:g} s")
        if num_pictures > self.max_pictures:
            raise Problem("limit", f"more than {self.max_pictures} pictures")
