"""How long a record will be, guessed before anything is decoded: tokens of its text, frames of its media.

The guesses sort samples of like length together and fill the dry run's histogram. They may be too low, and those of a
slow disk are poorer than those of a fast one: what must not be exceeded, such as memory, is planned with
`largest_num_frames`.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterable, Sequence

from valley.data.records import Media
from valley.data.storage import Root
from valley.errors import MediaError
from valley.media.decode import Limits
from valley.media.probe import probe
from valley.media.sampling import Sampling, expected_frames

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Of UTF-8, for the subword vocabularies in use: about 4 letters, or one and a third CJK characters."""
TYPICAL_CLIP_S = 18.0
"""Length of a clip when nothing is known: the mean of WebVid, which Valley-702k is drawn from."""
PROBING_S = 30.0
"""Seconds that probing the videos of one source may take, for the run waits."""
PROBE_S = 5.0
"""Seconds that one of them may take."""


def text_tokens(turns_json: bytes) -> int:
    """Tokens of a dialogue, from its size; the JSON around the text stands for the template's marks."""
    return -(-len(turns_json) // BYTES_PER_TOKEN)


def largest_num_frames(media: Iterable[Media], sampling: Sampling) -> int:
    """The most frames that a record's media can give together; no file is looked at, and none can give more.

    One file counts as a clip even where the record calls it an image, for only its content decides.
    """
    most = most_frames(sampling)
    return sum(min(len(medium.paths), most) if len(medium.paths) > 1 else most for medium in media)


class FrameEstimator:
    """Estimates the frames of a source's records.

    The first local videos are probed (their headers, nothing is decoded), so that in a small source on a disk in good
    order most lengths are right, and in a large one the typical length is. All others are given the typical length.

    Args:
        root: where the source's media are; remote ones are never probed.
        sampling: how the source's clips are sampled.
        limits: what probing may cost; its deadline is shortened.
        max_probes: videos to probe at most.
        max_seconds: time that probing may take in all.
    """

    def __init__(
        self, root: Root, sampling: Sampling, limits: Limits, *, max_probes: int, max_seconds: float = PROBING_S
    ) -> None:
        self._root, self._sampling, self._limits = root, sampling, limits
        self._max_seconds, self._seconds_left = max_seconds, max_seconds
        probing = root.is_local and sampling.mode == "fps"
        self._probes_left = max_probes if probing else 0
        self._known: dict[Media, int] = {}
        self._typical = _frames_of(TYPICAL_CLIP_S, sampling)

    def num_frames(self, records: Sequence[tuple[Media, ...]]) -> list[int]:
        """Frames of each record, all its media together."""
        self._probe_some(medium for media in records for medium in media if _is_video(medium))
        return [sum(self._frames(medium) for medium in media) for media in records]

    def _frames(self, medium: Media) -> int:
        if medium.kind == "image":
            return 1
        if len(medium.paths) > 1:
            return min(len(medium.paths), most_frames(self._sampling))
        return self._known.get(medium, self._typical)

    def _probe_some(self, videos: Iterable[Media]) -> None:
        if not self._probes_left:
            return
        new = [medium for medium in dict.fromkeys(videos) if medium not in self._known][: self._probes_left]
        for medium in new:
            if self._seconds_left <= 0:
                text = "%s: probing its videos took %g s, so the lengths of all but the first %d are guessed"
                logger.warning(text, self._root.location, self._max_seconds, len(self._known))
                self._probes_left = 0
                break
            self._probes_left -= 1
            self._probe(medium)
        if self._known:
            self._typical = round(statistics.fmean(self._known.values()))

    def _probe(self, medium: Media) -> None:
        deadline_s = min(self._limits.deadline_s, PROBE_S, self._seconds_left)
        started_s = time.monotonic()
        # What cannot be probed keeps its guess here; the loader will meet it again and say so.
        with contextlib.suppress(MediaError, OSError):
            file = self._root.find(medium.candidates(medium.paths[0]))
            info = probe(file.address, self._limits.model_copy(update={"deadline_s": deadline_s}))
            self._known[medium] = expected_frames(info, self._sampling)
        self._seconds_left -= time.monotonic() - started_s


def most_frames(sampling: Sampling) -> int:
    """The most frames a clip can give."""
    return sampling.num_frames if sampling.mode == "fixed" else sampling.max_frames


def _frames_of(duration_s: float, sampling: Sampling) -> int:
    if sampling.mode == "fixed":
        return sampling.num_frames
    return max(1, min(sampling.max_frames, round(duration_s * sampling.fps)))


def _is_video(medium: Media) -> bool:
    return medium.kind == "video" and len(medium.paths) == 1
