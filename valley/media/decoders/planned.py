"""The frames wanted, by PyAV, decoding as few pictures as it takes.

What costs is decoding, and all libraries decode alike. So only the stretch from a keyframe to the last picture wanted
behind it is fed to the decoder, and of H.264, HEVC and AV1 not even those pictures on the way that nothing refers to.
Every packet that is fed must give its picture; otherwise the plan was wrong, or the file is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import av
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from . import nal, obu
from .clip import Clip


class DistrustError(Exception):
    """Something came out otherwise than planned; only decoding everything can tell what is right."""


@dataclass
class Run:
    """A stretch of packets to decode, from a keyframe on.

    Attributes:
        start: the keyframe's packet.
        stop: the packet behind the last one.
        wanted: packets whose pictures are wanted.
    """

    start: int
    stop: int
    wanted: set[int] = field(default_factory=set)


def can_plan(clip: Clip) -> bool:
    """Whether the packets' times tell which packet to decode.

    Interlaced streams may keep the two fields of a picture in two packets, and half a picture is easily taken for one.
    """
    return bool(clip.keys) and not clip.counted and not clip.interlaced


def plan(clip: Clip, packets: Sequence[int]) -> list[Run]:
    """Returns the runs that give the pictures of `packets`, in the order of the file."""
    runs: list[Run] = []
    for start, packet in sorted((clip.key_before(packet), packet) for packet in packets):
        if not runs or start > runs[-1].stop:
            runs.append(Run(start, packet + 1))
        runs[-1].stop = max(runs[-1].stop, packet + 1)
        runs[-1].wanted.add(packet)
    return runs


def read_planned(clip: Clip, positions: Sequence[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the pictures at `positions`, each with its position, in any order.

    Raises:
        DistrustError: a run did not give what it should have; pictures that were yielded are right nevertheless.
    """
    position_at = {int(clip.pts[clip.shown[position]]): position for position in positions}
    numbered = enumerate(clip.packets())
    for run in plan(clip, [int(clip.shown[position]) for position in positions]):
        if any(run.start <= packet < run.stop for packet in clip.corrupt):
            raise DistrustError
        for frame in _decode(clip, numbered, run):
            if frame.pts is not None and (position := position_at.pop(frame.pts, None)) is not None:
                yield position, frame
    if position_at:
        raise DistrustError


def _decode(clip: Clip, numbered: Iterator[tuple[int, Packet[VideoStream]]], run: Run) -> Iterator[VideoFrame]:
    """Feeds one run to the decoder and yields all that comes out.

    Raises:
        DistrustError: an error, a damaged picture, a keyframe that is none, or fewer pictures than packets.
    """
    context = clip.decoder()
    due: set[int] = set()
    for packet in chain(_needed(clip, numbered, run, due), (None,)):
        try:
            frames = context.decode(packet)
        except MemoryError:
            raise
        except av.FFmpegError:
            raise DistrustError from None
        for frame in frames:
            if frame.is_corrupt or (frame.pts == clip.pts[run.start] and not frame.key_frame):
                raise DistrustError
            due.discard(frame.pts or 0)
            yield frame
    if due:
        raise DistrustError
    context.flush_buffers()


def _needed(
    clip: Clip, numbered: Iterator[tuple[int, Packet[VideoStream]]], run: Run, due: set[int]
) -> Iterator[Packet[VideoStream]]:
    """Yields the packets of a run but for those that nothing refers to; puts the times of their pictures into `due`."""
    is_disposable = _disposable_by(clip)
    for number, packet in numbered:
        if number < run.start:
            continue
        if number in run.wanted or not is_disposable(memoryview(packet)):
            if not packet.is_discard and (clip.pts[number] >= clip.pts[run.start] or number in run.wanted):
                due.add(int(clip.pts[number]))
            yield packet
        if number + 1 == run.stop:
            return


def _disposable_by(clip: Clip) -> Callable[[memoryview], bool]:
    """Returns what tells the packets that no other picture refers to: a mark that is binding, or nothing."""
    configuration = clip.stream.codec_context.extradata or b""
    length_bytes = nal.length_bytes(clip.codec, configuration)
    if clip.codec == "h264":
        return partial(nal.is_disposable, codec="h264", length_bytes=length_bytes)
    # In HEVC the mark holds within a temporal layer only, so there must be just one.
    if clip.codec == "hevc" and nal.temporal_layers(configuration) == 1:
        return partial(nal.is_disposable, codec="hevc", length_bytes=length_bytes)
    if clip.codec == "av1" and (sequence := obu.read_sequence(configuration)) is not None:
        return partial(obu.is_disposable, sequence=sequence)
    return lambda packet: False
