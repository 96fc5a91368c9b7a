"""Which times of a clip the model looks at (paper 4.1: 0.5 frames a second)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from valley.config import Settings


class Sampling(Settings):
    """How frames are chosen from a clip; saved with the checkpoint, so training and serving sample alike."""

    mode: Literal["fps", "fixed"] = "fps"
    """`fps`: one frame every 1/fps seconds (the paper); `fixed`: num_frames spread over the clip (its code)."""
    fps: PositiveFloat = 0.5
    """Frames a second in `fps` mode (paper 4.1)."""
    max_frames: PositiveInt = 100
    """More frames than this are thinned evenly, in `fps` mode."""
    num_frames: PositiveInt = 8
    """Frames a clip in `fixed` mode; a shorter clip gives fewer."""
