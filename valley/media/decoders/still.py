"""The one frame of an image, by Pillow, the way image-text models are trained on them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .bounds import Bounds
from .containers import Container
from .problems import Problem


class Still:
    """An open image file: its header, and with `pixels` its picture.

    Attributes:
        notes: what is unusual about it.
    """

    def __init__(self, file: io.FileIO, container: Container, *, bounds: Bounds) -> None:
        Image.MAX_IMAGE_PIXELS = None  # the limit below takes its place
        file.seek(0)
        try:
            self._image = Image.open(file, formats=[container.demuxer])
            bounds.check_size(*self._image.size)
            # After the check: the orientation of a PNG may stand behind its picture, which Pillow then decodes.
            self._rotation = _TURNS.get(self._image.getexif().get(_ORIENTATION, 1), 0)
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(error, container) from None
        self._container = container
        self.notes = ["animated: the first picture is used"] if getattr(self._image, "n_frames", 1) > 1 else []

    def info(self) -> dict[str, Any]:
        """What the file is: the fields of `valley.media.probe.MediaInfo`."""
        width, height = self._image.size
        if self._rotation % 180:
            width, height = height, width
        return {
            "kind": "image",
            "container": self._container.name,
            "codec": self._container.name,
            "duration_s": 0.0,
            "width": width,
            "height": height,
            "fps": 0.0,
            "rotation": self._rotation,
            "num_frames": 1,
        }

    def pixels(self) -> NDArray[np.uint8]:
        """Decodes the picture: upright RGB `[H, W, 3]`."""
        try:
            upright = ImageOps.exif_transpose(self._image)
            if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off above 255
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise _damaged(error, self._container) from None


_ORIENTATION = 0x0112
_TURNS = {3: 180, 4: 180, 5: 270, 6: 270, 7: 90, 8: 90}


def _damaged(error: Exception, container: Container) -> Exception:
    """Pillow raises OSError for broken images; those with a number are the storage's.

    Its own words are not passed on: some hold the address of an object in memory (CVE-2026-22778).
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if isinstance(error, UnidentifiedImageError):
        return Problem("damaged", f"no {container.name} header that can be read")
    if "truncated" in str(error):
        return Problem("damaged", "truncated: the picture ends early")
    return Problem("damaged", f"a {container.name} image that cannot be decoded")
