"""How much memory one file may take."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def memory_bounded(max_bytes: int) -> Iterator[None]:
    """Has the system refuse this process more memory within the block, which mostly ends in a MemoryError.

    What counts is memory of its own that can be written to, all that malloc gives (Linux; elsewhere nothing counts).
    Libraries, and memory shared with the parent, do not count, so address space (RLIMIT_AS) would be the wrong measure.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    already = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([max_bytes, *already]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
