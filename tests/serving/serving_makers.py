"""A server of the tiny model in this process, and what one asks it."""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import uvicorn
from training_makers import new_model, processor

from valley.assistant.loading import Assistant
from valley.config import load_settings
from valley.serving.plain import LocalBackend, server_config
from valley.serving.service import Service
from valley.serving.settings import ServeSettings
from valley.serving.viewing import LocalDecoder


def new_assistant() -> Assistant:
    """The tiny model with random weights, in fp32; the same each time."""
    model = new_model()
    return Assistant(model.to(torch.float32).eval(), processor())


def serve_settings(*overrides: str) -> ServeSettings:
    return load_settings(ServeSettings, None, ["model=unused", "port=0", "engine.threads=1", *overrides])


@contextlib.contextmanager
def serving(*overrides: str, assistant: Assistant | None = None) -> Iterator[str]:
    """Runs a server on a free port of this machine; yields its address."""
    settings = serve_settings(*overrides)
    service = Service(settings, LocalDecoder(), assistant or new_assistant())
    try:
        with running(settings, LocalBackend(service)) as address:
            yield address
    finally:
        service.close()


@contextlib.contextmanager
def running(settings: ServeSettings, backend: Any) -> Iterator[str]:
    """Runs the API in front of a backend on a free port of this machine; yields its address."""
    server = uvicorn.Server(server_config(settings, backend))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def write_clip(path: Path, *, seconds: int = 6, colour: tuple[int, int, int] = (200, 30, 30)) -> Path:
    """Writes a clip that any browser plays: H.264 4:2:0, a square that moves to the right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "28"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(4 * seconds):
            picture = np.full((64, 96, 3), 230, np.uint8)
            left = 2 + number * 3 % 70
            picture[20:44, left : left + 24] = colour
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def data_url(path: Path, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def asked(text: str, *urls: str) -> list[dict[str, Any]]:
    """A conversation of one question about videos."""
    media = [{"type": "video_url", "video_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
