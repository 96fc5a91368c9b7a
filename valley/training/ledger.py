"""What could not be used: one table for all ranks, and the share of it that a run puts up with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from valley.data.loading import reading_policy
from valley.data.rejects import KnownRejects, Reject, RejectBudget, read_rejects, write_rejects
from valley.data.settings import DataSettings
from valley.errors import RejectLimitError
from valley.training.engines.base import Engine
from valley.training.feed import Step
from valley.training.meter import Counts

REJECTS_FILE = "rejects.parquet"


class Ledger:
    """Collects the rejects of all ranks, judges their share, and writes them down on rank 0.

    Args:
        engine: gathers from the ranks.
        folder: where the table goes.
        settings: how large a share is too large.
        before: what was rejected before the training, when the manifest was made.
        num_used: samples that were used before, when a run goes on; what was rejected then is in the table.
    """

    def __init__(
        self, engine: Engine, folder: Path, settings: DataSettings, before: Sequence[Reject] = (), *, num_used: int = 0
    ) -> None:
        self._engine, self.path, self._policy = engine, folder / REJECTS_FILE, reading_policy(settings)
        self._budget = RejectBudget(settings.max_rejected, settings.rejects_grace)
        self._settings = settings
        self._rejects: dict[tuple[str, str, str], Reject] = {}
        self._known = KnownRejects.load(self.path, policy=self._policy)
        self._validated = False
        self._add(before)
        if num_used:
            listed = read_rejects(self.path) if self.path.exists() else []  # the run folder may be lost
            earlier = [reject for reject in listed if reject.slot is not None]
            self._budget.add(num_used, earlier)
            self._add(earlier)

    @property
    def rejects(self) -> list[Reject]:
        """What this run could not use."""
        return list(self._rejects.values())

    def _add(self, rejects: Iterable[Reject]) -> None:
        """A sample is listed once for each file of it, however often it is met."""
        for reject in rejects:
            self._rejects.setdefault((reject.source, reject.sample_id, reject.path), reject)

    def inspect(self, step: Step, counts: Counts) -> None:
        """Takes in a step's rejects; ranks speak to each other only when there are any.

        Raises:
            RejectLimitError: on all ranks, when too large a share was rejected; the table is written before.
        """
        rejects = self._engine.all_gather(step.rejects) if counts.num_rejected else []
        self._add(rejects)
        try:
            self._budget.add(counts.num_samples, rejects)
        except RejectLimitError:
            self.write()
            raise

    def inspect_held_out(self, rejects: Sequence[Reject], num_samples: int) -> None:
        """Takes in rejects of validation, the first time only: it looks at the same samples again and again.

        Args:
            rejects: this rank's.
            num_samples: held-out samples that all ranks could use.

        Raises:
            RejectLimitError: on all ranks, when too large a share was rejected, or all; the table is written before.
        """
        if self._validated:
            return
        self._validated = True
        gathered = self._engine.all_gather(rejects)
        self._add(gathered)
        try:
            RejectBudget(self._settings.max_rejected, self._settings.rejects_grace).add(num_samples, gathered)
            if gathered and not num_samples:
                first = gathered[0]
                raise RejectLimitError(
                    f"none of the held-out samples can be used; the first: {first.path}: {first.reason}"
                )
        except RejectLimitError:
            self.write()
            raise

    def write(self) -> None:
        """Writes the table, on rank 0; files that an earlier run rejected and this one did not meet stay in it."""
        if self._engine.rank == 0:
            write_rejects([*self._known.unvisited(self.rejects), *self.rejects], self.path, policy=self._policy)
