"""How a run tells a person where it is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tqdm import tqdm


@dataclass(frozen=True)
class Moment:
    """What is shown of a step.

    Attributes:
        step: steps taken, this one included.
        loss: of the global batch.
        learning_rate: of the first group.
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

    def __init__(
        self, total_steps: int, first_step: int = 0, stream: Writable | None = None, every_s: float = 10.0
    ) -> None:
        self._total, self._first, self._stream, self._every_s = total_steps, first_step, stream, every_s
        self._started_s = time.monotonic()
        self._last_s: float | None = None

    def update(self, moment: Moment) -> None:
        """See `Progress`."""
        now_s = time.monotonic()
        due = self._last_s is None or now_s - self._last_s >= self._every_s
        if not due and moment.step < self._total:
            return
        self._last_s = now_s
        left_s = (now_s - self._started_s) / (moment.step - self._first) * (self._total - moment.step)
        self.say(f"step {moment.step}/{self._total}: {moment}, {_clock(left_s)} left")

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


def make_progress(total_steps: int, first_step: int, rank: int) -> Progress:
    """Returns a bar on rank 0's terminal, lines where rank 0 has none, silence on other ranks."""
    if rank != 0:
        return Silent()
    return Bar(total_steps, first_step) if sys.stderr.isatty() else Lines(total_steps, first_step)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:d}:{minutes:02d}:{seconds:02d}"
