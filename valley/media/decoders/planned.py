"""The frames wanted, by PyAV, decoding as few pictures as it takes.

What costs is decoding, and all libraries decode alike. So only the stretch from a keyframe to the last picture wanted
behind it is fed to the decoder, and in H.264 and HEVC pictures that nothing refers to are skipped on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

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
    """Yields the pictures at `positions` in the order of presentation, each with its position, in any order.

    Raises:
        DistrustError: a run did not give what it should have; pictures that were yielded are right nevertheless.
    """
    position_at = {int(clip.pts[clip.shown[position]]): position for position in positions}
    runs = plan(clip, [int(clip.shown[position]) for position in positions])
    corrupt = set(clip.corrupt)
    context = clip.decoder()
    skips = _may_skip(clip)
    numbered = enumerate(clip.packets())
    for run in runs:
        if any(run.start <= packet < run.stop for packet in corrupt):
            raise DistrustError
        left = {int(clip.pts[packet]) for packet in run.wanted}
        for frame in _decode(context, numbered, run, skips=skips):
            if frame.is_corrupt or (frame.pts == clip.pts[run.start] and not frame.key_frame):
                raise DistrustError
            if frame.pts in left:
                left.remove(frame.pts)
                yield position_at[frame.pts], frame
        if left:
            raise DistrustError


def _decode(
    context: VideoCodecContext, numbered: Iterator[tuple[int, Packet[VideoStream]]], run: Run, *, skips: bool
) -> Iterator[VideoFrame]:
    """Feeds one run to the decoder and takes out all that comes."""
    skipping = False
    try:
        for number, packet in numbered:
            if number < run.start:
                continue
            if skips and skipping is (number in run.wanted):
                skipping = not skipping
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            yield from context.decode(packet)
            if number + 1 == run.stop:
                break
        yield from context.decode(None)
    except av.FFmpegError:
        raise DistrustError from None
    context.flush_buffers()


def _may_skip(clip: Clip) -> bool:
    """Whether leaving out pictures that are marked as no reference is safe.

    In H.264 the mark is binding. In HEVC it holds within a temporal layer only, so there must be just one. Other
    decoders gain nothing, or read the switch only once.
    """
    if clip.codec == "h264":
        return True
    if clip.codec != "hevc":
        return False
    configuration = clip.stream.codec_context.extradata or b""  # an hvcC record in mp4 and Matroska
    return len(configuration) > 21 and configuration[0] == 1 and configuration[21] >> 3 & 7 == 1
