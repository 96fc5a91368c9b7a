"""Makes the clips that the media tests look at: every picture carries its own number as a barcode.

A test that reads the number back knows which picture it was really given, whatever the timestamps claim.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 10
SIZE = (192, 128)
NUM_FRAMES = 60
FPS = 25

DEFAULT_OPTIONS = {
    "libx264": {"preset": "veryfast", "sc_threshold": "0"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:scenecut=0:bframes=2"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "8", "crf": "8", "svtav1-params": "lp=1"},
}


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture with some motion in it and `number` as a barcode across its centre."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    ground = 128 + 50 * np.sin((x + 3 * number) / 17.0) + 40 * np.cos((y - 2 * number) / 11.0)
    pixels = np.repeat(ground[..., None], 3, axis=2)
    pixels[..., 1] += 20 * np.sin(number / 5.0)
    cell = width // (BITS + 2)
    top, left = height // 2 - cell, (width - BITS * cell) // 2
    for bit in range(BITS):
        level = 235 if number >> bit & 1 else 20
        pixels[top : top + 2 * cell, left + bit * cell : left + (bit + 1) * cell] = level
    return np.clip(pixels, 0, 255).astype(np.uint8)


def number_in(pixels: np.ndarray) -> int:
    """The number of the picture that `pixels` shows."""
    height, width = pixels.shape[:2]
    cell = width // (BITS + 2)
    left = (width - BITS * cell) // 2
    middles = [left + bit * cell + cell // 2 for bit in range(BITS)]
    rows = slice(height // 2 - cell // 2, height // 2 + cell // 2)
    return sum(1 << bit for bit, x in enumerate(middles) if pixels[rows, x - 1 : x + 2].mean() > 128)


def numbers_in(pixels: np.ndarray) -> list[int]:
    return [number_in(one) for one in pixels]


def encode(
    path: Path,
    codec: str = "libx264",
    *,
    num_frames: int = NUM_FRAMES,
    gop: int = 20,
    pix_fmt: str = "yuv420p",
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, FPS),
    rotation: int = 0,
    mirrored: bool = False,
    container: str | None = None,
    options: dict[str, str] | None = None,
    muxer_options: dict[str, str] | None = None,
    draw: Callable[[int], np.ndarray] = picture,
) -> Path:
    """Encodes pictures 0 … num_frames - 1, shown at `pts` (in `time_base`; default: evenly).

    They are stored so that mirroring them, if `mirrored`, and then turning them by `rotation` makes them upright.
    """

    def stored(number: int) -> np.ndarray:
        turned = np.rot90(draw(number), -rotation // 90)
        return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)

    with av.open(str(path), "w", format=container, options=muxer_options or {}) as output:
        stream = output.add_stream(codec, rate=FPS, options=DEFAULT_OPTIONS.get(codec, {}) | (options or {}))
        stream.height, stream.width, stream.pix_fmt = *stored(0).shape[:2], pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = time_base
        if mirrored:  # PyAV mirrors after the turn
            stream.set_display_rotation(-rotation, hflip=True)
        elif rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(stored(number), format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (number if pts is None else pts[number]), time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def cut_from_keyframe(source: Path, path: Path, keyframe: int) -> Path:
    """Copies the packets from the given keyframe on, as a cut without re-encoding does."""
    with av.open(str(source)) as whole, av.open(str(path), "w") as output:
        stream = whole.streams.video[0]
        copy = output.add_stream_from_template(stream)
        seen = -1
        for packet in whole.demux(stream):
            seen += bool(packet.size) and packet.is_keyframe
            if packet.size and seen >= keyframe:
                packet.stream = copy
                output.mux(packet)
    return path


def hide_start(path: Path, ticks: int) -> Path:
    """Has the edit list of an mp4 hide the first `ticks` of its time base."""
    data = bytearray(path.read_bytes())
    entry = data.index(b"elst") + 16
    (media_time,) = struct.unpack_from(">i", data, entry)
    struct.pack_into(">i", data, entry, media_time + ticks)
    path.write_bytes(data)
    return path


def decode_all(source: Path | bytes) -> list[np.ndarray]:
    """Every picture by plain PyAV, upright, in the order it comes."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return [_upright(frame) for frame in container.decode(container.streams.video[0])]


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """The pixel (x, y) of a frame is shown at (a x + c y, b x + d y)."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if a == 0:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if b + d < 0 else 1, :: -1 if a + c < 0 else 1]


def even_times(num_frames: int = NUM_FRAMES, fps: int = FPS) -> list[float]:
    return [number / fps for number in range(num_frames)]


@dataclass(frozen=True)
class Case:
    """A kind of clip.

    Attributes:
        make: writes it; the path has the right suffix.
        times_s: when each of its pictures is shown, in seconds from the first.
        first: the number of the first picture.
        decord: decord gets it right, so it is used when asked for.
    """

    suffix: str
    make: Callable[[Path], Path]
    times_s: list[float] = field(default_factory=even_times)
    first: int = 0
    decord: bool = False

    def number_at(self, time_s: float) -> int:
        """The number of the picture on screen at a time."""
        return self.first + max(k for k, shown_s in enumerate(self.times_s) if shown_s <= time_s + 1e-9)


VFR_PTS = [300 * number + 7 * number**2 for number in range(NUM_FRAMES)]
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:min-keyint=20"}
HEVC_OPEN_GOP = {"x265-params": "log-level=none:open-gop=1:keyint=20:min-keyint=20:bframes=3:scenecut=0"}
REFRESH = {"x264-params": "intra-refresh=1:bframes=0"}


def _cut_open_gop(path: Path, codec: str, options: dict[str, str]) -> Path:
    whole = encode(path.with_name(f"whole-{path.stem}.mp4"), codec, options=options)
    return cut_from_keyframe(whole, path, 1)


CASES = {
    "long GOP": Case(".mp4", lambda p: encode(p, gop=250), decord=True),
    "short GOP": Case(".mp4", lambda p: encode(p, gop=10), decord=True),
    "B-pyramid": Case(".mp4", lambda p: encode(p, options={"x264-params": "b-pyramid=normal:bframes=5"}), decord=True),
    "one frame": Case(".mp4", lambda p: encode(p, num_frames=1), [0.0], decord=True),
    "open GOP": Case(".mp4", lambda p: encode(p, options=OPEN_GOP)),
    "cut at an open GOP": Case(".mkv", lambda p: _cut_open_gop(p, "libx264", OPEN_GOP), even_times(40), first=20),
    "gradual refresh": Case(".mp4", lambda p: encode(p, options=REFRESH)),
    "variable frame rate": Case(
        ".mp4",
        lambda p: encode(p, pts=VFR_PTS, time_base=Fraction(1, 10000)),
        [ticks / 10000 for ticks in VFR_PTS],
    ),
    "edit list": Case(".mp4", lambda p: hide_start(encode(p), 17 * 512), even_times(43), first=17),
    "turned by 90": Case(".mp4", lambda p: encode(p, rotation=90), decord=True),
    "turned by 180": Case(".mp4", lambda p: encode(p, rotation=180), decord=True),
    "turned by 270": Case(".mov", lambda p: encode(p, rotation=270), decord=True),
    "turned by 90 in Matroska": Case(".mkv", lambda p: encode(p, rotation=90)),
    "mirrored": Case(".mp4", lambda p: encode(p, mirrored=True)),
    "mirrored, turned by 90": Case(".mov", lambda p: encode(p, rotation=90, mirrored=True)),
    "mirrored, turned by 180": Case(".mp4", lambda p: encode(p, rotation=180, mirrored=True)),
    "mirrored, turned by 270 in Matroska": Case(".mkv", lambda p: encode(p, rotation=270, mirrored=True)),
    "10 bits": Case(".mp4", lambda p: encode(p, pix_fmt="yuv420p10le")),
    "late start, 10 bits": Case(".mkv", lambda p: encode(p, pix_fmt="yuv420p10le", pts=range(33, 33 + NUM_FRAMES))),
    "late start": Case(".mkv", lambda p: encode(p, pts=range(33, 33 + NUM_FRAMES)), decord=True),
    "interlaced": Case(".mp4", lambda p: encode(p, options={"x264-params": "tff=1"})),
    "fragmented": Case(
        ".mp4", lambda p: encode(p, muxer_options={"movflags": "frag_keyframe+empty_moov"}), decord=True
    ),
    "H.264 in Matroska": Case(".mkv", encode, decord=True),
    "H.264 in MPEG-TS": Case(".ts", encode),
    "H.264 in AVI": Case(".avi", encode),
    "H.264 in FLV": Case(".flv", encode),
    "HEVC": Case(".mp4", lambda p: encode(p, "libx265")),
    "HEVC in MPEG-TS": Case(".ts", lambda p: encode(p, "libx265")),
    "HEVC, open GOP": Case(".mp4", lambda p: encode(p, "libx265", options=HEVC_OPEN_GOP)),
    "HEVC, cut at an open GOP": Case(
        ".mkv", lambda p: _cut_open_gop(p, "libx265", HEVC_OPEN_GOP), even_times(40), first=20
    ),
    "VP9": Case(".webm", lambda p: encode(p, "libvpx-vp9")),
    "VP9, hidden frames": Case(
        ".webm", lambda p: encode(p, "libvpx-vp9", options={"deadline": "good", "lag-in-frames": "16"})
    ),
    "VP8": Case(".webm", lambda p: encode(p, "libvpx", options={"deadline": "realtime", "b": "1M"})),
    "AV1": Case(".mp4", lambda p: encode(p, "libsvtav1")),
    "AV1 in Matroska": Case(".mkv", lambda p: encode(p, "libsvtav1")),
    "MPEG-4 in AVI": Case(".avi", lambda p: encode(p, "mpeg4", options={"bf": "2", "b": "2M"})),
    "MPEG-2 in MPEG-PS": Case(".mpg", lambda p: encode(p, "mpeg2video", container="mpeg", options={"b": "2M"})),
    "Windows Media": Case(".wmv", lambda p: encode(p, "wmv2", container="asf", options={"b": "2M"})),
    "Motion JPEG": Case(".avi", lambda p: encode(p, "mjpeg", pix_fmt="yuvj420p", options={"b": "2M"})),
    "ProRes": Case(".mov", lambda p: encode(p, "prores_ks", pix_fmt="yuv422p10le", num_frames=12), even_times(12)),
    "GIF": Case(".gif", lambda p: encode(p, "gif", pix_fmt="rgb8")),
}
