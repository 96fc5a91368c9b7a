"""What reading one file may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from valley.config import Settings


class Limits(Settings):
    """What one decode may cost, and what becomes of damaged files."""

    deadline_s: PositiveFloat = 60.0
    """Seconds that opening a file and finding its pictures may take."""
    deadline_s_per_frame: NonNegativeFloat = 2.0
    """Seconds more for each frame wanted, so that a file cannot lengthen its own deadline: 260 s for 100 frames. A long
    clip of which every picture must be decoded (interlaced, or H.264 in AVI) may need more, and is then rejected."""
    max_bytes: PositiveInt = 4 << 30
    """Largest file."""
    max_pixels: PositiveInt = 8192 * 4320
    """Largest picture, width times height."""
    max_aspect_ratio: Annotated[float, Field(ge=1)] = 100.0
    """Longest picture, its long side over its short one: what is longer is no picture but an attack or a mistake."""
    max_duration_s: PositiveFloat = 6 * 3600.0
    """Longest clip."""
    max_pictures: PositiveInt = 2_000_000
    """Most pictures in a clip; six hours at 60 a second have 1.3 million."""
    max_memory_bytes: PositiveInt = 4 << 30
    """Most memory of the process that decodes (enforced on Linux); 8K HEVC takes 1 GB."""
    damaged: Literal["reject", "use"] = "reject"
    """Truncated or corrupt videos: reject them, or use what is whole and note it.

    What can be told: that a file ends early, of every container but MPEG-PS, live recordings that state no size, and
    FLV and MPEG-TS cut just between two packets; damage within packets of H.264 and HEVC, where the frames wanted hang
    on it; of VP8 and VP9 only at the start of a packet, for what follows decodes to something whatever it is. The
    decoders of AV1, MPEG-4 and the others notice some damage within packets and pass over some; decord passes over all.
    """
