"""Media made with PyAV's own encoders, a fake encoder of text, and small data files."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from valley.errors import RecordError


def write_clip(path: Path, duration_s: float, *, fps: int = 5, width: int = 64, height: int = 48) -> Path:
    """An H.264 clip that gets brighter by 10 levels a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "g": "10", "crf": "10"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for index in range(round(duration_s * fps)):
            level = min(255, 20 + 10 * index // fps)
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), level, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_picture(path: Path, level: int, *, size_px: int = 40) -> Path:
    """A PNG of one grey."""
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.width = stream.height = size_px
        stream.pix_fmt = "rgb24"
        picture = np.full((size_px, size_px, 3), level, dtype=np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def ask(question: str = "<video>what?", answer: str = "that", **fields: Any) -> dict[str, Any]:
    """A record."""
    dialogue = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**fields, "conversations": dialogue}


class LetterEncoded(NamedTuple):
    input_ids: np.ndarray
    labels: np.ndarray
    cut_tokens: int


class LetterEncoder:
    """A token per letter, one per medium (1000 + its frames); an answer is supervised, `silence` never is."""

    def encode(self, messages: Sequence[Any], num_frames: Sequence[int], *, max_tokens: int | None) -> LetterEncoded:
        frames, ids, supervised = iter(num_frames), [], []
        for message in messages:
            for part in message["content"]:
                piece = [ord(letter) for letter in part["text"]] if "text" in part else [1000 + next(frames)]
                ids += piece
                supervised += [message["role"] == "assistant" and part.get("text") != "silence"] * len(piece)
        if not any(supervised[:max_tokens]):
            raise RecordError("", "conversations", "nothing supervised is left")
        kept = np.array(ids[:max_tokens])
        return LetterEncoded(kept, np.where(supervised[:max_tokens], kept, -100), len(ids) - len(kept))


def write_json(path: Path, *records: Any) -> str:
    """Writes a data file; returns its path as settings take it."""
    path.write_text(json.dumps(records))
    return str(path)
