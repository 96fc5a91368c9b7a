"""The table of rejects keeps every field, recognises unchanged files, and bounds the share of bad samples."""

from dataclasses import replace
from pathlib import Path

import pytest

from valley.data.rejects import KnownRejects, Reject, RejectBudget, Stage, read_rejects, write_rejects
from valley.errors import RejectLimitError

DAMAGED = Reject(7, "a", "webvid", "/videos/a.mp4", "decode", "DamagedMediaError", "cut short", 0.25, 1000, "17")
MISSING = Reject(8, "b", "webvid", "/videos/b.mp4", "read", "MissingMediaError", "no such file", 0.0)
UNUSABLE = Reject(None, "#3", "webvid", "/data.json", "parse", "RecordError", "conversations: empty", 0.0)


def test_the_table_keeps_every_field(tmp_path: Path) -> None:
    rows = [DAMAGED, MISSING, UNUSABLE]
    write_rejects(rows, tmp_path / "rejects.parquet")
    assert read_rejects(tmp_path / "rejects.parquet") == rows
    write_rejects([], tmp_path / "rejects.parquet")
    assert read_rejects(tmp_path / "rejects.parquet") == []
    assert [path.name for path in tmp_path.iterdir()] == ["rejects.parquet"]


def test_a_file_is_known_until_it_changes(tmp_path: Path) -> None:
    write_rejects([DAMAGED, MISSING, UNUSABLE], tmp_path / "rejects.parquet", policy="p")
    known = KnownRejects.load(tmp_path / "rejects.parquet", policy="p")
    assert len(known) == 1
    assert known.find("/videos/a.mp4", 1000, "17") == DAMAGED
    assert known.find("/videos/a.mp4", 1000, "18") is None
    assert known.find("/videos/a.mp4", 1001, "17") is None
    assert known.find("/other/a.mp4", 1000, "17") is None


def test_a_known_file_stays_known_from_run_to_run(tmp_path: Path) -> None:
    write_rejects([replace(DAMAGED, stage="known")], tmp_path / "rejects.parquet")
    assert KnownRejects.load(tmp_path / "rejects.parquet").find("/videos/a.mp4", 1000, "17") is not None


@pytest.mark.parametrize(
    ("error", "reason", "lasts"),
    [
        ("DamagedMediaError", "1 of the 4 frames wanted are damaged", True),
        ("DamagedMediaError", "cannot be decoded: Cannot allocate memory", False),
        ("UnsupportedMediaError", "not a media file", True),
        ("EmptyMediaError", "zero bytes", True),
        ("MediaLimitError", "30000 s long, more than 21600 s", True),
        ("MediaLimitError", "more memory needed than there is", False),
        ("DecodeTimeoutError", "not decoded within 60 s", False),
        ("DecodeTimeoutError", "the decoder process died: signal 9", False),
        ("MissingMediaError", "may not be read: permission denied", False),
    ],
)
@pytest.mark.parametrize("stage", ["decode", "known"])
def test_only_faults_of_the_file_itself_are_remembered(stage: Stage, error: str, reason: str, lasts: bool) -> None:
    known = KnownRejects([replace(DAMAGED, stage=stage, error=error, reason=reason)])
    assert (known.find("/videos/a.mp4", 1000, "17") is not None) == lasts


def test_a_second_run_forgets_no_file_that_it_did_not_visit(tmp_path: Path) -> None:
    other = replace(DAMAGED, sample_id="o", path="/videos/other.mp4")
    write_rejects([DAMAGED, other, other, MISSING], tmp_path / "rejects.parquet", policy="p")
    known = KnownRejects.load(tmp_path / "rejects.parquet", policy="p")
    changed = replace(DAMAGED, modified="18")
    assert known.unvisited([changed, MISSING]) == [replace(other, slot=None, stage="known")]
    write_rejects([*known.unvisited([changed]), changed], tmp_path / "rejects.parquet", policy="p")
    again = KnownRejects.load(tmp_path / "rejects.parquet", policy="p")
    assert len(again) == 2
    assert again.find("/videos/other.mp4", 1000, "17") is not None
    assert again.find("/videos/a.mp4", 1000, "17") is None


def test_another_way_of_reading_knows_nothing(tmp_path: Path) -> None:
    write_rejects([DAMAGED], tmp_path / "rejects.parquet", policy="reject damaged files")
    assert not len(KnownRejects.load(tmp_path / "rejects.parquet", policy="use damaged files"))
    assert not len(KnownRejects.load(tmp_path / "nothing.parquet"))


def test_the_budget_waits_for_its_grace_then_stops_the_run() -> None:
    budget = RejectBudget(0.05, grace=100)
    for _ in range(9):
        budget.add(1, [DAMAGED, MISSING, MISSING])
    budget.add(63, [])
    assert (budget.num_tried, budget.num_rejected) == (99, 27)
    with pytest.raises(RejectLimitError) as caught:
        budget.add(1, [])
    message = str(caught.value)
    assert "27 of 100 samples (27.0%) were rejected, more than data.max_rejected allows (5.0%)" in message
    assert message.index("18 MissingMediaError") < message.index("9 DamagedMediaError")
    assert "/videos/b.mp4: no such file" in message


def test_the_budget_allows_the_share_itself() -> None:
    budget = RejectBudget(0.05, grace=10)
    budget.add(95, [DAMAGED] * 5)
    with pytest.raises(RejectLimitError):
        budget.add(0, [DAMAGED])
