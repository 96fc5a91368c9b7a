from __future__ import annotations

from collections.abc import Iterator

import pytest
from abuse import Canary, canary


@pytest.fixture
def bird() -> Iterator[Canary]:
    with canary() as one:
        yield one
