"""How long a record will be, guessed before anything is decoded: tokens of its text, frames of its media.

The guesses sort samples of like length together and fill the dry run's histogram; nothing else relies on them.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterable, Sequence

from valley.data.records import Media
from valley.data.storage import Root
from valley.errors import MediaError
from valley.media.decode import Limits
from valley.media.probe import probe
from valley.media.sampling import Sampling, expected_frames

BYTES_PER_TOKEN = 4
"""Of UTF-8, for the subword vocabularies in use: about 4 letters, or one and a third CJK characters."""
TYPICAL_CLIP_S = 18.0
"""Length of a clip when nothing is known: the mean of WebVid, which Valley-702k is drawn from."""


def text_tokens(turns_json: bytes) -> int:
    """Tokens of a dialogue, from its size; the JSON around the text stands for the template's marks."""
    return -(-len(turns_json) // BYTES_PER_TOKEN)


class FrameEstimator:
    """Estimates the frames of a source's records.

    The first local videos are probed (their headers, nothing is decoded), so that in a small source every length is
    right and in a large one the typical length is.

    Args:
        root: where the source's media are; remote ones are never probed.
        sampling: how the source's clips are sampled.
        limits: what probing may cost.
        max_probes: videos to probe at most.
    """

    def __init__(self, root: Root, sampling: Sampling, limits: Limits, *, max_probes: int) -> None:
        self._root, self._sampling, self._limits = root, sampling, limits
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
        self._probes_left -= len(new)
        for medium in new:
            # What cannot be probed keeps its guess here; the loader will meet it again and say so.
            with contextlib.suppress(MediaError, OSError):
                file = self._root.find(medium.candidates(medium.paths[0]))
                self._known[medium] = expected_frames(probe(file.address, self._limits), self._sampling)
        if self._known:
            self._typical = round(statistics.fmean(self._known.values()))


def most_frames(sampling: Sampling) -> int:
    """The most frames a clip can give."""
    return sampling.num_frames if sampling.mode == "fixed" else sampling.max_frames


def _frames_of(duration_s: float, sampling: Sampling) -> int:
    if sampling.mode == "fixed":
        return sampling.num_frames
    return max(1, min(sampling.max_frames, round(duration_s * sampling.fps)))


def _is_video(medium: Media) -> bool:
    return medium.kind == "video" and len(medium.paths) == 1
