"""Small real clips and data files for whole runs."""

import json
from pathlib import Path

import av
import numpy as np


def write_clip(path: Path, *, seed: int = 0, num_frames: int = 60, fps: int = 10) -> Path:
    """An H.264 clip of a square that wanders over noise."""
    random = np.random.default_rng(seed)
    background = random.integers(60, 190, (96, 128, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for index in range(num_frames):
            picture = background.copy()
            picture[20:50, index : index + 30] = (250, 30, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_records(path: Path, videos: list[str]) -> Path:
    """A data file with one question and answer about each video, in the paper's format."""
    records = [
        {
            "id": f"sample-{index}",
            "video": video,
            "conversations": [
                {"from": "human", "value": "Describe the following video concisely.\n<video>"},
                {"from": "gpt", "value": f"A red square moves right over noise number {index}."},
            ],
        }
        for index, video in enumerate(videos)
    ]
    path.write_text(json.dumps(records))
    return path
