"""Guesses of lengths: right where videos were probed, within a time budget; and bounds that hold whatever the files."""

import logging
from pathlib import Path

import pytest
from data_makers import write_clip

from valley.data.estimate import TYPICAL_CLIP_S, FrameEstimator, largest_num_frames
from valley.data.records import Media
from valley.data.storage import Root
from valley.media.decode import Limits
from valley.media.sampling import Sampling

TYPICAL = round(TYPICAL_CLIP_S / 2)


def video(path: str) -> Media:
    return Media("video", (path,))


def estimate(folder: Path, names: list[str], *, max_seconds: float, max_probes: int = 9) -> list[int]:
    root = Root(str(folder))
    estimator = FrameEstimator(root, Sampling(), Limits(), max_probes=max_probes, max_seconds=max_seconds)
    return estimator.num_frames([(video(name),) for name in names])


def test_probed_videos_are_right_and_the_others_are_typical(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.mp4", 7)
    write_clip(tmp_path / "b.mp4", 11)
    (tmp_path / "text.mp4").write_text("no video")
    assert estimate(tmp_path, ["a.mp4", "b", "text.mp4"], max_seconds=60) == [4, 6, 5]
    assert estimate(tmp_path, ["a.mp4", "b", "text.mp4"], max_seconds=60, max_probes=1) == [4, 4, 4]
    assert not caplog.records


def test_probing_ends_with_its_time_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_clip(tmp_path / "a.mp4", 7)
    write_clip(tmp_path / "b.mp4", 11)
    with caplog.at_level(logging.WARNING):
        assert estimate(tmp_path, ["a.mp4", "b.mp4"], max_seconds=0.0) == [TYPICAL, TYPICAL]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: probing its videos took 0 s, so the lengths of all but the first 0 are guessed"
    ]


def test_no_record_gives_more_than_its_largest_number_of_frames() -> None:
    pictures = Media("video", tuple(f"{number}.jpg" for number in range(12)))
    media = (video("a.mp4"), Media("image", ("b.jpg",)), pictures)
    assert largest_num_frames(media, Sampling(max_frames=20)) == 20 + 20 + 12
    assert largest_num_frames(media, Sampling(max_frames=10)) == 30
    assert largest_num_frames(media, Sampling(mode="fixed", num_frames=8)) == 24
    assert largest_num_frames((), Sampling()) == 0
