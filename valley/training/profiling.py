"""Where the time of a few steps went: torch's profiler over them, on rank 0, as a trace and as a table."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from valley.training.settings import ProfileSettings

logger = logging.getLogger(__name__)

PROFILE_FOLDER = "profile"
_ROWS = 40


@contextmanager
def profiling(
    settings: ProfileSettings | None, folder: Path, written: Callable[[Path], None]
) -> Iterator[Callable[[], None]]:
    """Profiles the steps within, and gives what to call after each of them.

    Args:
        settings: which steps; None: none, on every rank but the first.
        folder: takes `trace.json.gz` (for Perfetto or chrome://tracing) and `operators.txt`.
        written: is told of the folder once it is filled.
    """
    if settings is None:
        yield lambda: None
        return

    done = False

    def write(profiler: profile) -> None:
        nonlocal done
        done = True
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        table = profiler.key_averages().table(sort_by=_most_wanted(), row_limit=_ROWS, max_name_column_width=60)
        (folder / "operators.txt").write_text(table)
        written(folder)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=settings.after, warmup=1, active=settings.steps, repeat=1)
    with profile(
        activities=activities,
        schedule=plan,
        on_trace_ready=write,
        record_shapes=settings.shapes,
        profile_memory=settings.memory,
    ) as profiler:
        yield profiler.step
    if not done:
        logger.warning("nothing was profiled: fewer than %d steps were taken", settings.after + 2)


def _most_wanted() -> str:
    return "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
