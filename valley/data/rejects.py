"""Rejected samples: a table that names each with its reason, and the share of them a run puts up with.

A bad sample is a value, never an exception: whoever finds one makes a `Reject` and goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from valley.errors import RejectLimitError

Stage = Literal["parse", "read", "decode", "encode", "known"]
_EXAMPLE_LENGTH = 160
_FAULTS_OF_THE_FILE = ("UnsupportedMediaError", "DamagedMediaError", "EmptyMediaError", "MediaLimitError")
"""What a second look at the same bytes finds again, unlike a busy machine, a killed decoder or a lost permission."""


@dataclass(frozen=True, slots=True)
class Reject:
    """One sample that could not be used.

    Attributes:
        slot: the slot it was to fill; None for a record rejected while the manifest was made.
        sample_id: the record's id.
        source: name of its source.
        path: the file at fault: a media file, or the data file when the record itself is.
        stage: where it failed; `known`: it failed in an earlier run, and the file has not changed.
        error: class of the error.
        reason: what is wrong, in one line.
        seconds: time spent on it.
        size_bytes: size of the media file, None where there is none.
        modified: mark of the media file's last change, None where there is none.
    """

    slot: int | None
    sample_id: str
    source: str
    path: str
    stage: Stage
    error: str
    reason: str
    seconds: float
    size_bytes: int | None = None
    modified: str | None = None


_SCHEMA = pa.schema(
    [
        pa.field("slot", pa.int64()),
        *(pa.field(name, pa.string()) for name in ("sample_id", "source", "path", "stage", "error", "reason")),
        pa.field("seconds", pa.float64()),
        pa.field("size_bytes", pa.int64()),
        pa.field("modified", pa.string()),
    ]
)


def write_rejects(rejects: Iterable[Reject], path: Path, *, policy: str = "") -> None:
    """Writes a table of rejects as Parquet, whole or not at all.

    Args:
        rejects: its rows, perhaps none.
        path: the file, replaced when it exists.
        policy: how the files were read (`loading.reading_policy`); another policy makes no use of the table.
    """
    rows = [asdict(reject) for reject in rejects]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata({"policy": policy}))
    partial = path.with_name(f".{path.name}.partial")
    pq.write_table(table, partial)
    partial.replace(path)


def read_rejects(path: Path) -> list[Reject]:
    """The rows of a table that `write_rejects` wrote."""
    return _to_rejects(pq.read_table(path))


def _to_rejects(table: pa.Table) -> list[Reject]:
    names = [field.name for field in fields(Reject)]
    return [Reject(**row) for row in table.select(names).to_pylist()]


def _is_lasting(reject: Reject) -> bool:
    """Whether the file itself is at fault, so that it will be as long as it does not change."""
    if reject.stage not in ("decode", "known") or reject.modified is None:
        return False
    # A machine short of memory comes as a limit, or as damage where FFmpeg met it; only the words tell.
    return reject.error in _FAULTS_OF_THE_FILE and "memory" not in reject.reason.lower()


class KnownRejects:
    """Media files that failed in an earlier run, so that none is opened again before it changes.

    Args:
        rejects: rows of an earlier table; those that another try may mend are left out.
    """

    def __init__(self, rejects: Iterable[Reject] = ()) -> None:
        self._by_file: dict[tuple[str, int | None, str | None], Reject] = {
            (reject.path, reject.size_bytes, reject.modified): reject for reject in rejects if _is_lasting(reject)
        }

    @classmethod
    def load(cls, path: Path, *, policy: str = "") -> KnownRejects:
        """Those in an earlier run's table; none when there is no table, or the files were read in another way."""
        if not path.is_file():
            return cls()
        table = pq.read_table(path)
        written_under = (table.schema.metadata or {}).get(b"policy", b"").decode()
        return cls(_to_rejects(table) if written_under == policy else ())

    def __len__(self) -> int:
        return len(self._by_file)

    def find(self, path: str, size_bytes: int | None, modified: str | None) -> Reject | None:
        """The earlier reject of this very file; None when it never failed, or has changed since."""
        return self._by_file.get((path, size_bytes, modified))

    def unvisited(self, rejects: Iterable[Reject]) -> list[Reject]:
        """The earlier rejects of files that these are not about, in no slot, so that a table of both forgets none.

        Args:
            rejects: what the present run has rejected so far.
        """
        visited = {reject.path for reject in rejects}
        return [
            replace(reject, slot=None, stage="known") for reject in self._by_file.values() if reject.path not in visited
        ]


class RejectBudget:
    """Counts samples tried and rejected, and stops the run when too large a share is bad.

    Args:
        max_share: the largest share of tried samples that may be rejected (`data.max_rejected`).
        grace: samples tried before the share is judged (`data.rejects_grace`).
    """

    def __init__(self, max_share: float, grace: int) -> None:
        self.max_share, self.grace = max_share, grace
        self.num_tried = 0
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, Reject] = {}

    @property
    def num_rejected(self) -> int:
        """Samples rejected so far."""
        return self._counts.total()

    def add(self, num_good: int, rejects: Sequence[Reject]) -> None:
        """Counts samples that were used and samples that were rejected.

        Raises:
            RejectLimitError: the share of rejects is above the limit.
        """
        self.num_tried += num_good + len(rejects)
        for reject in rejects:
            self._counts[reject.error] += 1
            self._examples.setdefault(reject.error, reject)
        if self.num_tried >= self.grace and self.num_rejected > self.max_share * self.num_tried:
            raise RejectLimitError(self._explain())

    def _explain(self) -> str:
        share = self.num_rejected / self.num_tried
        lines = [
            f"{self.num_rejected} of {self.num_tried} samples ({share:.1%}) were rejected, "
            f"more than data.max_rejected allows ({self.max_share:.1%}):"
        ]
        for error, count in self._counts.most_common():
            example = self._examples[error]
            text = f"{example.path}: {example.reason}"
            lines.append(f"  {count} {error}, the first: {text[:_EXAMPLE_LENGTH]}")
        return "\n".join(lines)
