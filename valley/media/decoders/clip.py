"""A video's packets and the times of its pictures, found without decoding.

One pass over the packets gives every picture's presentation time, which keyframe it hangs on, and whether an edit list
hides it: all that sampling and seeking need, exactly, whatever the frame rate does.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from . import boxes, elements
from .bounds import Bounds
from .containers import AVI, MATROSKA, MOV, MP4, WEBM, Container
from .orientation import Orientation
from .problems import Problem
from .wholeness import missing_bytes

KEPT_BYTES = 64 << 20
"""Packets kept in memory from the pass that finds them to the one that decodes; a file with more is read twice."""
_PACKET_BYTES = 512
"""What a packet takes beside its data."""

CODECS = (
    frozenset({"h264", "hevc", "vp8", "vp9", "av1"})
    | {"mpeg4", "mpeg2video", "mpeg1video", "msmpeg4v2", "msmpeg4v3", "h263", "flv1", "vp6f"}
    | {"wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "prores", "dnxhd", "ffv1", "gif"}
)
"""Codecs that are decoded, by FFmpeg's names."""

_ORIENTATIONS = {
    MP4: boxes.orientation_of,
    MOV: boxes.orientation_of,
    MATROSKA: elements.orientation_of,
    WEBM: elements.orientation_of,
}


class Clip:
    """An open video file: its header, and after `scan` its packets.

    Packets are known by their position in the file, pictures by the packet they come from.

    Attributes:
        codec: FFmpeg's name of the codec.
        orientation: how the container has its pictures shown; PyAV does not tell before one is decoded.
        pts: presentation time of every packet, in the stream's time base.
        keys: the packets where decoding can start.
        shown: the packets whose pictures are shown, in the order of presentation.
        times_s: when those are shown, in seconds from the first.
        duration_s: from the first picture to the end of the last.
        corrupt: packets that the demuxer found damaged.
        counted: packets' times do not tell the order of the pictures; the n-th decoded picture is the n-th shown.
        missing_bytes: by how much the file is shorter than it says, at least.
        unreadable: the demuxer gave up before the end.
    """

    def __init__(self, file: io.FileIO, container: Container, *, bounds: Bounds, kept_bytes: int = KEPT_BYTES) -> None:
        self.file, self.container = file, container
        self._kept_bytes = kept_bytes
        self._file_bytes = os.fstat(file.fileno()).st_size
        self._bounds = bounds
        self._input = self._open()
        self.stream = _video_stream(self._input)
        self.codec = self.stream.codec_context.codec.canonical_name
        if self.codec not in CODECS:
            raise Problem("unsupported", f"{self.codec} video, which is not read")
        bounds.check_size(self.stream.width, self.stream.height)
        find_orientation = _ORIENTATIONS.get(container)
        self.orientation = find_orientation(file.fileno(), self._file_bytes) if find_orientation else Orientation()
        self.pts = np.zeros(0, np.int64)
        self.keys: list[int] = []
        self.shown = np.zeros(0, np.int64)
        self.times_s = np.zeros(0)
        self.duration_s = 0.0
        self.corrupt: list[int] = []
        self.counted = False
        self.missing_bytes = 0
        self.unreadable = False
        self._kept: list[Packet[VideoStream]] | None = []

    @property
    def interlaced(self) -> bool:
        """Whether the two fields of a picture may come in two packets."""
        return self.stream.codec_context.field_order > 1

    @property
    def fps(self) -> float:
        """The average frame rate that the header tells, 0 when it does not."""
        return float(self.stream.average_rate or self.stream.guessed_rate or 0)

    def stated_info(self) -> dict[str, Any]:
        """What the header says the file is: the fields of `valley.media.probe.MediaInfo`, 0 where it says nothing."""
        stream = self.stream
        if stream.duration is not None and stream.time_base is not None:
            duration_s = float(stream.duration * stream.time_base)
        else:
            duration_s = (self._input.duration or 0) / av.time_base
        width, height = (
            (stream.height, stream.width) if self.orientation.rotation % 180 else (stream.width, stream.height)
        )
        return {
            "kind": "video",
            "container": self.container.name,
            "codec": self.codec,
            "duration_s": max(duration_s, 0.0),
            "width": width,
            "height": height,
            "fps": self.fps,
            "rotation": self.orientation.rotation,
            "num_frames": stream.frames or round(max(duration_s, 0.0) * self.fps),
        }

    def info(self) -> dict[str, Any]:
        """The same with what the packets say."""
        return self.stated_info() | {"duration_s": self.duration_s, "num_frames": len(self.shown)}

    @property
    def cut(self) -> str:
        """In which way the file ends early; empty if it does not."""
        if self.missing_bytes:
            return f"truncated: at least {self.missing_bytes} bytes are missing at its end"
        if self.unreadable:
            return f"not readable to its end, only {self.duration_s:.1f} s"
        if self.corrupt and self.corrupt[-1] == len(self.pts) - 1:
            return "truncated: its last packet is incomplete"
        return ""

    @property
    def kept_packets(self) -> int:
        """How many packets stand in memory."""
        return len(self._kept or ())

    def decoder(self) -> VideoCodecContext:
        """Returns the stream's decoder. It has one thread: the workers share the cores."""
        context = self.stream.codec_context
        if not context.is_open:
            context.thread_count = 1
            context.options = {"max_pixels": str(self._bounds.max_pixels)}
            if self.codec == "hevc":  # it conceals errors without a mark unless told to report them
                context.options |= {"err_detect": "explode"}
        return context

    def close(self) -> None:
        """Lets go of the packets and the demuxer, but not of the file."""
        self._kept = None
        self._input.close()

    def packets(self) -> Iterator[Packet[VideoStream]]:
        """Yields the packets in the order of the file, each let go of as the next is asked for."""
        kept, self._kept = self._kept, None
        if kept is None:
            with self._open() as again, _ending_at_damage():
                yield from _demux(again, _video_stream(again))
        else:
            kept.reverse()
            while kept:
                yield kept.pop()

    def scan(self) -> None:
        """Reads all packets, decoding none, and fills in the attributes.

        Raises:
            Problem: not one picture is shown, or the clip is longer than its bounds.
            MemoryError: it takes more memory than it may.
        """
        self.missing_bytes = missing_bytes(self.file.fileno(), self.container, self._file_bytes)
        pts, durations, hidden = array("q"), array("q"), bytearray()
        first, last = math.inf, -math.inf
        tick_s = float(self.stream.time_base or 1)
        seen_bytes = 0
        try:
            for number, packet in enumerate(_demux(self._input, self.stream)):
                self.counted |= packet.pts is None
                time = packet.dts if packet.pts is None else packet.pts
                pts.append(time if time is not None else pts[-1] + 1 if pts else 0)
                durations.append(packet.duration or 0)
                hidden.append(packet.is_discard)
                if not packet.is_discard:
                    first, last = min(first, pts[-1]), max(last, pts[-1])
                    self._bounds.check_length((last - first) * tick_s, len(pts))
                if packet.is_keyframe:
                    self.keys.append(number)
                if packet.is_corrupt:
                    self.corrupt.append(number)
                seen_bytes += packet.size + _PACKET_BYTES
                if seen_bytes > self._kept_bytes:
                    self._kept = None
                elif self._kept is not None:
                    self._kept.append(packet)
        except MemoryError:
            raise
        except av.FFmpegError:
            self.unreadable = True
        if (self.missing_bytes or self.unreadable) and len(pts) - 1 not in self.corrupt:
            self.corrupt.append(len(pts) - 1)  # the end of the file came in the middle of it, or just behind
        self.pts = np.frombuffer(pts, np.int64)
        self._order_pictures(np.flatnonzero(~np.frombuffer(hidden, bool)), np.frombuffer(durations, np.int64))

    def _order_pictures(self, shown: NDArray[np.int64], durations: NDArray[np.int64]) -> None:
        if self.keys:
            shown = shown[self.pts[shown] >= self._first_decodable()]
        self.shown = shown[np.argsort(self.pts[shown], kind="stable")]
        if not len(shown):
            raise Problem("damaged" if self.missing_bytes or self.unreadable else "empty", "not one frame in it")
        ticks = self.pts[self.shown]
        # Packets in an AVI carry no presentation times; FFmpeg passes on those of decoding.
        self.counted |= self.container is AVI and self.codec in ("h264", "hevc")
        self.counted |= bool((np.diff(ticks) == 0).any())
        tick_s = float(self.stream.time_base or 1)
        self.times_s = (ticks - ticks[0]) * tick_s
        self.duration_s = float(self.times_s[-1]) + self._last_duration_s(int(durations[self.shown[-1]]) * tick_s)

    def _first_decodable(self) -> int:
        """The time of the first picture that can be decoded.

        Mostly the first keyframe's. A stream that was cut out of another may begin with pictures that are shown before
        it and hang on what was cut off, or with a keyframe that refreshes the picture bit by bit: the decoder knows.
        """
        start = self.keys[0]
        group = self.pts[start : self.keys[1] if len(self.keys) > 1 else None]
        if group.min() == group[0]:
            return int(group[0])
        context = self.decoder()
        first = next(self._pictures(context, start), None)
        context.flush_buffers()
        return int(group[0]) if first is None or first.pts is None else first.pts

    def _pictures(self, context: VideoCodecContext, start: int) -> Iterator[VideoFrame]:
        packets = self.packets() if self._kept is None else iter(self._kept)
        with _ending_at_damage():
            for packet in itertools.islice(packets, start, None):
                yield from context.decode(packet)

    def _last_duration_s(self, stated_s: float) -> float:
        if stated_s > 0:
            return stated_s
        if self.fps > 0:
            return 1 / self.fps
        return float(self.times_s[-1] - self.times_s[-2]) if len(self.times_s) > 1 else 0.0

    def key_before(self, packet: int) -> int:
        """Returns the keyframe that decoding must start at to get this packet's picture."""
        index = bisect_right(self.keys, packet) - 1
        if self.is_leading(packet):
            index -= 1
        return self.keys[max(index, 0)] if self.keys else 0

    def is_leading(self, packet: int) -> bool:
        """Whether a picture is shown before the keyframe it follows in the file: it may need the keyframe before that.

        Pictures shown after the keyframe do not refer to it.
        """
        index = bisect_right(self.keys, packet) - 1
        return index >= 0 and bool(self.pts[packet] < self.pts[self.keys[index]])

    def _open(self) -> InputContainer:
        self.file.seek(0)
        try:
            return av.open(
                self.file,
                "r",
                format=self.container.demuxer,
                options={"max_pixels": str(self._bounds.max_pixels)},
                container_options={"protocol_whitelist": "none"},  # what the file names stays closed
                metadata_errors="replace",
            )
        except MemoryError:
            raise
        except av.FFmpegError as error:
            raise Problem("damaged", f"no {self.container.name} header that can be read: {error.strerror}") from None


def _video_stream(container: InputContainer) -> VideoStream:
    """Chooses the stream that players show, and none of the cover pictures; the others are not read."""
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise Problem("unsupported", "no video in it")
    best = container.streams.best("video")
    stream = next((s for s in streams if best is not None and s.index == best.index), streams[0])
    if stream.codec_context is None:
        raise Problem("unsupported", "video of a codec that is not known")
    for other in container.streams:
        if other.index != stream.index:
            other.discard = av.stream.Discard.all
    return stream


@contextlib.contextmanager
def _ending_at_damage() -> Iterator[None]:
    """Ends the block where the file proves damaged. FFmpeg reports want of memory as it reports damage; it is none."""
    try:
        yield
    except MemoryError:
        raise
    except av.FFmpegError:
        return


def _demux(container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
    return (packet for packet in container.demux(stream) if packet.size)
