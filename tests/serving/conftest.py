from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from abuse import Canary, canary
from serving_makers import serving, write_clip


@pytest.fixture
def bird() -> Iterator[Canary]:
    with canary() as one:
        yield one


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of six seconds."""
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4")


@pytest.fixture(scope="session")
def server(clip: Path) -> Iterator[str]:
    """The address of a server of the tiny model that offers the clip on its page."""
    with serving("engine.max_tokens=2048", f"clips={clip.parent}") as address:
        yield address
