"""Decoding and resizing, measured: this project against decord, PyAV and torchcodec, on the same files in one run.

What is measured is what each would be used as: from a path to uint8 pictures of 224 pixels at 0.5 frames a second. Ours
is the path of production, with its probing, its checks of damage and its child process. The measure is CPU time, of
this process and of our child processes, with everything on one core: it stays put while a machine is busy with others.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from valley.data.clips import make_clips
from valley.errors import MissingMediaError
from valley.media import sandbox
from valley.media.decode import sample_clip
from valley.media.sampling import Sampling
from valley.performance.report import table, versions

SIZE_PX = 224
EVERY_S = 2.0
ROUNDS = 7
"""Rounds in which each reader reads each file; the first is not counted."""

Pictures = UInt8[np.ndarray, "T 224 224 3"]
Figure = float | str
"""CPU milliseconds; or, of a reader that cannot read the file, what it says."""
_OWN = "Valley"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        label: its name in the table.
        name: of the file.
        codec: PyAV's name of the encoder.
        size: width and height, pixels.
        num_frames: length.
        fps: frames a second.
        gop: frames from one keyframe to the next.
        options: the encoder's.
    """

    label: str
    name: str
    codec: str
    size: tuple[int, int]
    num_frames: int
    fps: int
    gop: int
    options: dict[str, str]


KINDS = (
    Kind("H.264 596x336, GOP 10 (as WebVid)", "short.mp4", "libx264", (596, 336), 509, 25, 10, {"crf": "23"}),
    Kind("H.264 596x336, GOP 250", "long.mp4", "libx264", (596, 336), 450, 30, 250, {"crf": "23"}),
    Kind("H.264 720p, GOP 250", "hd.mp4", "libx264", (1280, 720), 450, 30, 250, {"b": "3000000"}),
    Kind("HEVC 720p", "hevc.mp4", "libx265", (1280, 720), 300, 30, 250, {"x265-params": "log-level=none"}),
    Kind("VP9 720p", "vp9.webm", "libvpx-vp9", (1280, 720), 240, 30, 128, {"deadline": "realtime", "cpu-used": "6"}),
    Kind("AV1 720p", "av1.mp4", "libsvtav1", (1280, 720), 240, 30, 161, {"preset": "10", "crf": "35"}),
)


def run_decode_benchmark(output: Path) -> str:
    """Measures all readers on all kinds and returns a Markdown section; raw figures go to `decode.json` in `output`."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    readers = _readers()
    figures: dict[str, dict[str, Figure]] = {}
    for kind in KINDS:
        path = encode(kind, output)
        figures[kind.label] = measure(readers, path)
    (output / "decode.json").write_text(json.dumps(figures, indent=1))
    return report(figures, list(readers))


def _readers() -> dict[str, Callable[[str], Any]]:
    readers: dict[str, Callable[[str], Any]] = {_OWN: read_valley}
    if importlib.util.find_spec("decord"):
        readers["decord + PIL"] = _decord_reader()
    readers["PyAV, all frames + PIL"] = _pyav_reader()
    with contextlib.suppress(ImportError, RuntimeError, OSError):  # not installed, or without FFmpeg's libraries
        readers["torchcodec + torchvision"] = _torchcodec_reader()
    return readers


def read_valley(path: str) -> Pictures:
    """Valley's own reader, the path of production."""
    return sample_clip(path, Sampling(), size_px=SIZE_PX).pixels


def _to_picture() -> Callable[[UInt8[np.ndarray, "H W 3"]], UInt8[np.ndarray, "S S 3"]]:
    """open_clip's own transform, as far as the cropped PIL picture."""
    from open_clip.transform import image_transform

    steps = image_transform(SIZE_PX, is_train=False).transforms[:2]  # resize, centre crop

    def convert(frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
        picture = Image.fromarray(frame)
        for step in steps:
            picture = step(picture)
        return np.asarray(picture)

    return convert


def _decord_reader() -> Callable[[str], Pictures]:
    import decord

    convert = _to_picture()

    def read(path: str) -> Pictures:
        video = decord.VideoReader(path, num_threads=1)
        stride = round(video.get_avg_fps() * EVERY_S)
        frames = video.get_batch(range(0, len(video), stride)).asnumpy()
        return np.stack([convert(frame) for frame in frames])

    return read


def _pyav_reader() -> Callable[[str], Pictures]:
    convert = _to_picture()

    def read(path: str) -> Pictures:
        pictures, due_s = [], 0.0
        with av.open(path) as container:
            container.streams.video[0].thread_type = "NONE"
            for frame in container.decode(video=0):
                if frame.time is not None and frame.time >= due_s - 1e-6:
                    pictures.append(convert(frame.to_ndarray(format="rgb24")))
                    due_s += EVERY_S
        return np.stack(pictures)

    return read


def _torchcodec_reader() -> Callable[[str], Pictures]:
    decoders: Any = importlib.import_module("torchcodec.decoders")  # typed or not, as it is installed or not
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as transform

    def read(path: str) -> Pictures:
        video = decoders.VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate")
        about = video.metadata
        times_s = [about.begin_stream_seconds + t for t in np.arange(0, about.duration_seconds, EVERY_S)]
        frames = video.get_frames_played_at(times_s).data
        resized = transform.resize(frames, [SIZE_PX], interpolation=InterpolationMode.BICUBIC, antialias=True)
        pictures: Pictures = transform.center_crop(resized, [SIZE_PX]).permute(0, 2, 3, 1).numpy()
        return pictures

    return read


def measure(readers: dict[str, Callable[[str], Any]], path: Path) -> dict[str, Figure]:
    """Median CPU milliseconds of each reader; what it says, of a peer that cannot read the file.

    Raises:
        MediaError: Valley itself cannot.
    """
    spent: dict[str, list[float]] = {name: [] for name in readers}
    failed: dict[str, Figure] = {}
    for _ in range(ROUNDS):
        for name, read in readers.items():
            if name in failed:
                continue
            try:
                read(str(path))  # not counted: it finds the caches full of what the reader before left there
                before_s = _cpu_s()
                read(str(path))
            except Exception as error:  # the peers raise all sorts
                if name == _OWN:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                continue
            spent[name].append(1000 * (_cpu_s() - before_s))
    return {name: failed[name] if name in failed else statistics.median(values[1:]) for name, values in spent.items()}


def _cpu_s() -> float:
    """CPU seconds of this process and of the decoder processes."""
    return time.process_time() + sum(_process_cpu_s(pid) for pid in sandbox.process_ids())


def _process_cpu_s(pid: int) -> float:
    clock = (~pid << 3) | 2  # Linux's number of another process's CPU clock, see clock_getcpuclockid(3)
    return time.clock_gettime(clock)


def encode(kind: Kind, folder: Path) -> Path:
    """Writes a file of its kind from real footage where the sample package is installed, else from moving noise."""
    recipe = hashlib.blake2b(repr(kind).encode(), digest_size=4).hexdigest()
    stem, _, suffix = kind.name.partition(".")
    path = folder / f"{stem}-{recipe}.{suffix}"  # with other options, it is another file
    if path.exists():
        return path
    unfinished = path.with_name(f".{path.name}")
    width, height = kind.size
    pictures = _footage(folder, width, height)
    with av.open(str(unfinished), "w") as container:
        stream: Any = container.add_stream(kind.codec, rate=Fraction(kind.fps), options=kind.options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = kind.gop
        for index in range(kind.num_frames):
            turn = index % (2 * len(pictures) - 2)
            picture = pictures[min(turn, 2 * len(pictures) - 2 - turn)]  # forth and back, without a cut
            frame = av.VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts, frame.time_base = index, 1 / Fraction(kind.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    unfinished.replace(path)
    return path


def _footage(folder: Path, width: int, height: int) -> list[UInt8[np.ndarray, "h w"]]:
    try:
        clips = make_clips(folder / "footage").folder
    except MissingMediaError:
        return _panned_noise(width, height)
    pictures = []
    for name in ("bikes.mp4", "bigbuckbunny.mp4"):
        with av.open(str(clips / name)) as container:
            for frame in container.decode(video=0):
                scaled = frame.reformat(width, height, "yuv420p", interpolation="BICUBIC")
                pictures.append(scaled.to_ndarray())
    return pictures


def _panned_noise(width: int, height: int) -> list[UInt8[np.ndarray, "h w"]]:
    """A camera panning over soft spots, with the grain of a sensor."""
    random = np.random.default_rng(0)
    spots = Image.fromarray(random.integers(0, 255, (height // 12, width // 12, 3), dtype=np.uint8))
    ground = np.asarray(spots.resize((width + 360, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = random.normal(0, 3, (5, height, width, 1)).astype(np.int16)
    views = (ground[:, 3 * shift : 3 * shift + width] + grain[shift % 5] for shift in range(120))
    frames = (av.VideoFrame.from_ndarray(np.clip(view, 0, 255).astype(np.uint8), format="rgb24") for view in views)
    return [frame.reformat(format="yuv420p").to_ndarray() for frame in frames]


def report(figures: dict[str, dict[str, Figure]], readers: list[str]) -> str:
    """The figures as Markdown: a line a file, a column a reader, Valley's first."""
    rows = []
    for label, spent in figures.items():
        own = float(spent[_OWN])
        cells = [f"{own:.0f}"]
        for name in readers[1:]:
            peer = spent[name]
            cells.append("cannot read it" if isinstance(peer, str) else f"{peer:.0f} ({peer / own:.2f}x)")
        rows.append([label, *cells])
    return "\n\n".join(
        [
            f"{versions('av', 'decord', 'torchcodec', 'torch', 'torchvision', 'open_clip_torch')}. CPU milliseconds a "
            f"video from path to {SIZE_PX}-pixel uint8 frames at 0.5 FPS, all processes on one core, median of "
            f"{ROUNDS - 1} rounds, readers in turns; in brackets how many times Valley's cost that is.",
            table(["file", *readers], rows),
        ]
    )
