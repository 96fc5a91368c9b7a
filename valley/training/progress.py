"""How a run tells a person where it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tqdm import tqdm


@dataclass(frozen=True)
class Moment:
    """What is shown of a step.

    Attributes:
        step: steps taken, this one included.
        loss: of the global batch.
        learning_rate: the highest of all groups.
        samples_per_s: over all ranks.
        wait_share: share of the step that the slowest rank waited for data.
    """

    step: int
    loss: float
    learning_rate: float
    samples_per_s: float
    wait_share: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, lr {self.learning_rate:.2e}, {self.samples_per_s:.1f} samples/s, "
            f"waiting for data {self.wait_share:.0%}"
        )


@runtime_checkable
class Writable(Protocol):
    """Where text goes, such as `sys.stderr`."""

    def write(self, text: str, /) -> int:
        """Writes text."""
        ...

    def flush(self) -> None:
        """Shows what was written."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Shows a run's progress."""

    def update(self, moment: Moment) -> None:
        """Shows a step."""
        ...

    def say(self, text: str) -> None:
        """Writes text, beside whatever else is shown."""
        ...

    def close(self) -> None:
        """Leaves the last state standing."""
        ...


class Bar:
    """A bar with loss, learning rate, samples/s, data-wait share and the time that is left."""

    def __init__(self, total_steps: int, first_step: int = 0, stream: Writable | None = None) -> None:
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", file=stream or sys.stderr, dynamic_ncols=True
        )

    def update(self, moment: Moment) -> None:
        """See `Progress`."""
        self._bar.set_postfix_str(str(moment), refresh=False)
        self._bar.update(moment.step - self._bar.n)

    def say(self, text: str) -> None:
        """See `Progress`."""
        self._bar.write(text, file=self._bar.fp)

    def close(self) -> None:
        """See `Progress`."""
        self._bar.close()


class Lines:
    """A line for the first and last step, and for one every few seconds between them."""

    def __init__(self, total_steps: int, stream: Writable | None = None, every_s: float = 10.0) -> None:
        self._total, self._stream, self._every_s = total_steps, stream, every_s
        self._from: tuple[float, int] | None = None  # seconds and step of the first moment, which waited for a start
        self._last_s: float | None = None

    def update(self, moment: Moment) -> None:
        """See `Progress`."""
        now_s = time.monotonic()
        self._from = self._from or (now_s, moment.step)
        due = self._last_s is None or now_s - self._last_s >= self._every_s
        if not due and moment.step < self._total:
            return
        self._last_s = now_s
        first_s, first_step = self._from
        taken = moment.step - first_step
        left = f", {_clock((now_s - first_s) / taken * (self._total - moment.step))} left" if taken else ""
        self.say(f"step {moment.step}/{self._total}: {moment}{left}")

    def say(self, text: str) -> None:
        """See `Progress`."""
        stream = self._stream or sys.stderr
        stream.write(text + "\n")
        stream.flush()

    def close(self) -> None:
        """See `Progress`."""


class Silent:
    """Shows nothing: ranks other than the first."""

    def update(self, moment: Moment) -> None:
        """See `Progress`."""

    def say(self, text: str) -> None:
        """See `Progress`."""

    def close(self) -> None:
        """See `Progress`."""


class Spoken(Lines):
    """Words only: the steps are shown by whoever follows the run from outside."""

    def update(self, moment: Moment) -> None:
        """See `Progress`."""


def make_progress(total_steps: int, first_step: int, rank: int, *, followed: bool = False) -> Progress:
    """Returns a bar on rank 0's terminal, lines where rank 0 has none, silence on other ranks.

    Args:
        total_steps: the number of the last step.
        first_step: steps that were taken before.
        rank: this rank.
        followed: another process shows the steps (`following`).
    """
    if rank != 0:
        return Silent()
    if followed:
        return Spoken(total_steps)
    return Bar(total_steps, first_step) if sys.stderr.isatty() else Lines(total_steps)


@contextmanager
def following(curves: Path, total_steps: int, progress: Progress, every_s: float = 0.5) -> Iterator[None]:
    """Within: shows a run that other processes carry out, as its points appear in `metrics.jsonl`.

    Args:
        curves: the file; it may not be there yet.
        total_steps: the number of the last step.
        progress: shows them.
        every_s: seconds between two looks at it.
    """
    ended = threading.Event()
    tail = _Tail(curves)

    def follow() -> None:
        shown, last = 0, False
        while not last:
            last = ended.wait(every_s)  # looks once more after the end
            for moment in tail.moments():
                if moment.step > shown:
                    progress.update(moment)
                    shown = moment.step

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.close()


class _Tail:
    """What is added to a file of curves."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, 0

    def moments(self) -> Iterator[Moment]:
        """Yields the steps whose lines are whole and new."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._position:  # cut back to a checkpoint
                self._position = 0
            file.seek(self._position)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._position += len(whole)
        for point in map(json.loads, whole.splitlines()):
            if "train/loss" in point:
                rate = max(value for name, value in point.items() if name.startswith("train/learning_rate"))
                yield Moment(
                    point["step"], point["train/loss"], rate, point["speed/samples_per_s"], point["data/wait_share"]
                )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"
