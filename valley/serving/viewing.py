"""From the bytes of a medium to its visual tokens; those of media that were seen before are kept."""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from valley.errors import DecodeTimeoutError, OverloadError
from valley.media.decode import read_frames, sample_clip
from valley.media.limits import Limits
from valley.media.sampling import Sampling, spread
from valley.media.thumbnail import thumbnail
from valley.model.modeling import ValleyForConditionalGeneration
from valley.model.video_processing import Framing
from valley.serving.engine.settings import num_cores
from valley.serving.sources import Source

_THUMBNAIL_PX = 112


@dataclass(frozen=True)
class Look:
    """What to decode, and how.

    Attributes:
        source: the bytes.
        sampling: which frames; of a frame list, how many.
        framing: the tower's size.
        limits: what it may cost.
        is_image: of what moves, the first frame alone.
    """

    source: Source
    sampling: Sampling
    framing: Framing
    limits: Limits
    is_image: bool = False

    @property
    def key(self) -> str:
        """The same for the same frames only."""
        return f"{self.source.digest} {self.sampling.model_dump_json()}"


@dataclass(frozen=True)
class Clip:
    """Frames that the tower is to see.

    Attributes:
        pixels: RGB squares.
        times_s: when each was on screen; of a frame list, their numbers over its frames a second.
        thumbnails: the frames as small JPEG files.
    """

    pixels: UInt8[np.ndarray, "T S S 3"]
    times_s: tuple[float, ...]
    thumbnails: tuple[bytes, ...]


@dataclass(frozen=True)
class View:
    """A medium as the language model sees it.

    Attributes:
        tokens: visual tokens of its patches and frames.
        keys: a number for each of them, never that of other content; see `Prompt.keys`.
        times_s: of its frames.
        thumbnails: likewise.
        decode_s: seconds that decoding took; 0 where it was kept.
        encode_s: seconds of the tower, likewise.
        is_kept: it had been seen before.
    """

    tokens: Float[Tensor, "V H"]
    keys: Int64[np.ndarray, " V"]
    times_s: tuple[float, ...]
    thumbnails: tuple[bytes, ...]
    decode_s: float
    encode_s: float
    is_kept: bool = False

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return int(self.tokens.nbytes + self.keys.nbytes + sum(map(len, self.thumbnails)))


Decode = Callable[[Look], Awaitable[Clip]]
"""Decodes in some other process: a `LocalDecoder`, or a deployment of decoders."""


def decode(look: Look) -> Clip:
    """Returns the frames of a medium, decoded in a child process that may be killed.

    Raises:
        MediaError: it cannot be used; which error it is says why.
    """
    data = look.source.data
    if not isinstance(data, bytes):
        pixels, times_s = _decode_pictures(data, look)
    else:
        if look.is_image:
            frames = read_frames(data, [0.0], limits=look.limits, **look.framing)
        else:
            frames = sample_clip(data, look.sampling, limits=look.limits, **look.framing)
        pixels, times_s = frames.pixels, frames.times_s
    return Clip(pixels, times_s, tuple(thumbnail(picture, _THUMBNAIL_PX) for picture in pixels))


def _decode_pictures(files: Sequence[bytes], look: Look) -> tuple[UInt8[np.ndarray, "T S S 3"], tuple[float, ...]]:
    """Decodes a list of frames, with the deadline of a clip for all of them together."""
    most = look.sampling.max_frames if look.sampling.mode == "fps" else look.sampling.num_frames
    chosen = spread(len(files), most)
    deadline_s = look.limits.deadline_s + len(chosen) * look.limits.deadline_s_per_frame
    give_up_at = time.monotonic() + deadline_s
    pictures = []
    for number in chosen:
        left_s = give_up_at - time.monotonic()
        if left_s <= 0:
            raise DecodeTimeoutError("frames", f"not decoded within {deadline_s:g} s")
        limits = look.limits.model_copy(update={"deadline_s": left_s, "deadline_s_per_frame": 0.0})
        pictures.append(sample_clip(files[number], look.sampling, limits=limits, **look.framing).pixels)
    return np.concatenate(pictures), tuple(number / look.sampling.fps for number in chosen)


class LocalDecoder:
    """Decodes on threads of this process, each of which waits for a child process; a `Decode`.

    The threads are its own: media that take long hold up other media only.

    Args:
        at_once: media decoded at the same time; 0: one for each core.
        most_waiting: media that may wait for that.
    """

    def __init__(self, at_once: int = 0, most_waiting: int = 64) -> None:
        self._at_once, self._most_waiting = at_once or num_cores(), most_waiting
        self._threads = ThreadPoolExecutor(self._at_once, "decode")
        self._in_hand = 0

    async def __call__(self, look: Look) -> Clip:
        """Returns the frames of a medium.

        Raises:
            MediaError: it cannot be used.
            OverloadError: too many wait already.
        """
        if self._in_hand >= self._at_once + self._most_waiting:
            raise OverloadError("too many media are being decoded")
        self._in_hand += 1
        work = asyncio.get_running_loop().run_in_executor(self._threads, decode, look)
        work.add_done_callback(self._done)
        return await work

    def _done(self, work: asyncio.Future[Clip]) -> None:
        self._in_hand -= 1


class Viewer:
    """Looks at media with a model's tower, temporal module and projector.

    The visual tokens are kept by content and sampling. Several requests for the same medium wait for one look at it.

    Args:
        model: whose they are; the tower runs on a thread of its own, one medium at a time.
        decode: how media become frames.
        max_bytes: memory for what was seen; 0: nothing is kept.
        threads: CPU threads of the tower.
    """

    def __init__(self, model: ValleyForConditionalGeneration, decode: Decode, max_bytes: int, threads: int) -> None:
        self._model, self._decode, self._max_bytes = model, decode, max_bytes
        self._kept: OrderedDict[str, View] = OrderedDict()
        self._coming: dict[str, asyncio.Task[View]] = {}
        self._waiting: dict[str, int] = {}
        self._tower = ThreadPoolExecutor(1, "tower", torch.set_num_threads, (threads,))
        self.num_bytes = 0

    async def view(self, look: Look) -> View:
        """Returns the visual tokens of a medium.

        Raises:
            MediaError: it cannot be used.
        """
        key = look.key
        if view := self._kept.get(key):
            self._kept.move_to_end(key)
            return replace(view, decode_s=0.0, encode_s=0.0, is_kept=True)
        task = self._coming.get(key)
        if task is None:
            # In a context of its own: it is not the first one's alone, and must not end with it.
            task = asyncio.create_task(self._look(key, look), context=contextvars.Context())
            self._coming[key] = task
            task.add_done_callback(lambda done: self._come(key, done))
        self._waiting[key] = self._waiting.get(key, 0) + 1
        try:
            return await asyncio.shield(task)
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
                if not task.done():  # nobody wants it any more
                    del self._coming[key]
                    task.cancel()

    def close(self) -> None:
        """Forgets everything and ends the thread."""
        self._kept.clear()
        self.num_bytes = 0
        self._tower.shutdown(cancel_futures=True)

    async def _look(self, key: str, look: Look) -> View:
        began = time.monotonic()
        clip = await self._decode(look)
        decoded = time.monotonic()
        tokens = await asyncio.get_running_loop().run_in_executor(self._tower, self._encode, clip.pixels)
        view = View(
            tokens,
            _keys(key, len(tokens)),
            clip.times_s,
            clip.thumbnails,
            decode_s=decoded - began,
            encode_s=time.monotonic() - decoded,
        )
        self._keep(key, view)
        return view

    def _come(self, key: str, task: asyncio.Task[View]) -> None:
        if self._coming.get(key) is task:
            del self._coming[key]
        if not task.cancelled():
            task.exception()  # whoever waits for it hears of it; with nobody left it is no news

    @torch.inference_mode()
    def _encode(self, pixels: UInt8[np.ndarray, "T S S 3"]) -> Float[Tensor, "V H"]:
        device = self._model.device
        return self._model.visual_features(
            torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device),
            torch.tensor([len(pixels)], device=device),
        )

    def _keep(self, key: str, view: View) -> None:
        if view.num_bytes > self._max_bytes:
            return
        self._kept[key] = view
        self.num_bytes += view.num_bytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes


def _keys(name: str, count: int) -> Int64[np.ndarray, " V"]:
    """Negative numbers that stand for the positions of one medium, and of no other."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    return -1 - (start + np.arange(count, dtype=np.int64))
