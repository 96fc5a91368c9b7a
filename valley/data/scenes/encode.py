"""A scene as an H.264 file."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
from av.video.reformatter import VideoReformatter

from valley.data.scenes.render import pictures
from valley.data.scenes.scene import Scene

_QUALITY = "21"
"""x264's constant rate factor: so fine that a moving object leaves no trail that betrays where it came from."""


def film(scene: Scene, path: Path) -> None:
    """Paint a scene and write it as `.mp4`. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}-{os.getpid()}.mp4")
    try:
        with av.open(unfinished, "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=scene.fps, options=_options(scene))
            stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
            stream.codec_context.thread_count = 1  # the scenes are the parallel part, and frames must not depend on it
            stream.codec_context.time_base = Fraction(1, scene.fps)
            convert = VideoReformatter().reformat
            for number, picture in enumerate(pictures(scene)):
                if picture is not None:
                    frame = convert(av.VideoFrame.from_ndarray(picture, format="rgb24"), format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, scene.fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _options(scene: Scene) -> dict[str, str]:
    return {
        "preset": scene.coding.preset,
        "crf": _QUALITY,
        "g": str(scene.coding.gop),
        "bf": str(scene.coding.b_frames),
    }
