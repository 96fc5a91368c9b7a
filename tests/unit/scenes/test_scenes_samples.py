"""The job that makes the sample data: settings like any other job's, and a summary of what is there."""

import json

import pytest

from valley.command import parse_command
from valley.config import load_settings, preset_names
from valley.data.samples import SamplesSettings, make_samples
from valley.errors import SettingsError


def test_the_summary_tells_what_is_in_the_folder(tmp_path):
    settings = SamplesSettings(output=str(tmp_path), clips=2, heldout=4, kinds=["count"], workers=1, real=False)
    summary = make_samples(settings)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary.pop("seconds") > 0
    assert summary == {"clips": 6, "clips_made_now": 6, "real_clips": 0, "questions": {"count": 4}}
    assert make_samples(settings)["clips_made_now"] == 0


@pytest.mark.parametrize("preset", preset_names(SamplesSettings))
def test_every_preset_makes_something(preset, tmp_path):
    settings = load_settings(SamplesSettings, preset, [f"output={tmp_path}", "clips=2", "heldout=2", "workers=1"])
    assert make_samples(settings)["clips"] == 4


def test_the_job_takes_settings_and_names_wrong_ones():
    words = ["output=/somewhere", "clips=2", "kinds=[count, order]", "real=false"]
    settings = parse_command(SamplesSettings, "", words).settings
    assert (settings.output, settings.clips, settings.heldout) == ("/somewhere", 2, 40)
    assert (settings.kinds, settings.real) == (["count", "order"], False)
    with pytest.raises(SettingsError, match=r"(?s)clips.*sead|sead.*clips"):
        parse_command(SamplesSettings, "", ["clips=-1", "sead=3"])
