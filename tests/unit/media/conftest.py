from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from media_clips import CASES

Clips = Callable[[str], Path]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Gives the clip of a case, made when it is first asked for; not to be written to."""
    folder = tmp_path_factory.mktemp("clips")
    made: dict[str, Path] = {}

    def clip(name: str) -> Path:
        if name not in made:
            case = CASES[name]
            made[name] = case.make(folder / f"{name.replace(' ', '-').replace(',', '')}{case.suffix}")
        return made[name]

    return clip
