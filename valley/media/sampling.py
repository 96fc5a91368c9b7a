"""Which times of a clip the model looks at (paper 4.1: 0.5 frames a second)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveFloat, PositiveInt

from valley.config import Settings
from valley.media.probe import MediaInfo

TOLERANCE_S = 1e-6
"""Times closer than this are one: they are sums and products of fractions, and no frame is shown that briefly."""


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


def sample_times(
    info: MediaInfo, sampling: Sampling, frame_times_s: Sequence[float] | NDArray[np.float64] | None = None
) -> list[float]:
    """Returns the times to look at, in seconds from the first frame, ascending; at least one.

    In `fps` mode they are 0, 1/fps, 2/fps, … before the end; more than `max_frames` are thinned to those at
    round(linspace(0, n - 1, max_frames)). In `fixed` mode they are the times of the frames at
    round(linspace(0, N - 1, num_frames)), or of all N frames when there are no more. A still image has one, 0.

    Differs from the paper: it samples at 0.5 frames a second; the code its authors published trains on 8 fixed frames.

    Args:
        info: the clip.
        sampling: how to choose.
        frame_times_s: when each frame is shown; None: `num_frames` of `info`, evenly over its duration.
    """
    if info.kind == "image":
        return [0.0]
    if sampling.mode == "fps":
        count = max(1, math.ceil((info.duration_s - TOLERANCE_S) * sampling.fps))
        return [index / sampling.fps for index in spread(count, sampling.max_frames)]
    if frame_times_s is None:
        num_frames = max(1, info.num_frames)
        frame_times_s = [index * info.duration_s / num_frames for index in range(num_frames)]
    return [float(frame_times_s[index]) for index in spread(len(frame_times_s), sampling.num_frames)]


def expected_frames(info: MediaInfo, sampling: Sampling) -> int:
    """Returns how many frames will be looked at, as far as the header tells."""
    return len(sample_times(info, sampling))


def spread(count: int, most: int) -> list[int]:
    """Returns at most `most` indices below `count`, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [int(index) for index in np.linspace(0, count - 1, most).round()]
