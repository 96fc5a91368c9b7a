"""Makes the clips that the media tests look at: every picture carries its own number as a barcode.

A test that reads the number back knows which picture it was really given, whatever the timestamps claim.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 12


def picture(number: int, width: int, height: int) -> np.ndarray:
    """A picture with some motion in it and `number` as a barcode across its centre."""
    y, x = np.mgrid[0:height, 0:width]
    ground = 128 + 60 * np.sin((x + 3 * number) / 17.0) + 50 * np.cos((y - 2 * number) / 11.0)
    pixels = np.repeat(ground[..., None], 3, axis=2)
    pixels[..., 1] += 20 * np.sin(number / 5.0)
    cell = width // (BITS + 2)
    top, left = height // 2 - cell, (width - BITS * cell) // 2
    for bit in range(BITS):
        value = 235 if number >> bit & 1 else 20
        pixels[top : top + 2 * cell, left + bit * cell : left + (bit + 1) * cell] = value
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
    num_frames: int = 100,
    fps: int | Fraction = 25,
    size: tuple[int, int] = (224, 144),
    pix_fmt: str = "yuv420p",
    gop: int = 30,
    bframes: int = 2,
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    noise: int = 0,
) -> Path:
    """Encodes pictures 0 .. num_frames-1 with PyAV's own encoders; `pts` (in `time_base`) makes other than even steps."""
    defaults = {
        "libx264": {"preset": "veryfast", "bf": str(bframes), "sc_threshold": "0", "x264-params": "keyint_min=1"},
        "libx265": {"preset": "ultrafast", "x265-params": f"log-level=none:bframes={bframes}:scenecut=0"},
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
        "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
    }
    rate = Fraction(fps)
    random = np.random.default_rng(0)
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options={**defaults.get(codec, {}), **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        if time_base is not None:
            stream.codec_context.time_base = time_base
        for number in range(num_frames):
            pixels = picture(number, *size)
            if noise:
                pixels = np.clip(pixels + random.integers(-noise, noise + 1, pixels.shape), 0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
            frame.pts = number if pts is None else pts[number]
            frame.time_base = time_base or 1 / rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def patch_rotation(path: Path, degrees: int) -> None:
    """Writes a display matrix into an mp4's track header: shown turned clockwise by `degrees`."""
    matrices = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (value << 16 for value in matrices[degrees])
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def patch_edit_list(path: Path, *, skip: int) -> None:
    """Makes an mp4's edit list skip `skip` more units of the track's time base at the start."""
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 8
    (entries,) = struct.unpack(">I", data[start : start + 4])
    assert entries == 1
    duration, media_time = struct.unpack(">Ii", data[start + 4 : start + 12])
    data[start + 4 : start + 12] = struct.pack(">Ii", duration, media_time + skip)
    path.write_bytes(data)


def decode_all(source: Path | bytes) -> tuple[list[float], np.ndarray]:
    """Every picture by plain PyAV, upright, with its time from the first one in seconds."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        frames = [
            (frame.time, np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90))
            for frame in container.decode(stream)
        ]
    return [time - frames[0][0] for time, _ in frames], np.stack([pixels for _, pixels in frames])


def shown_at(times: Sequence[float], t: float) -> int:
    """Position of the picture on screen at `t`: the last whose time is not after it."""
    return max(index for index, time in enumerate(times) if time <= t + 1e-6)
