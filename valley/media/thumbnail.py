"""Frames as small pictures for people."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def thumbnail(frame: UInt8[np.ndarray, "H W 3"], most_px: int) -> bytes:
    """Returns a frame as a JPEG file whose longer side is `most_px` at most."""
    small = Image.fromarray(frame)
    small.thumbnail((most_px, most_px))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return file.getvalue()
