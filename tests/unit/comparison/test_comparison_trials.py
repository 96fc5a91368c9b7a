"""A search space becomes whole trainings: every point with every seed, in folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from comparison_makers import compare_settings

from valley.comparison.settings import CompareSettings
from valley.comparison.trials import list_encodings, list_trials
from valley.config import load_settings, preset_names
from valley.errors import SettingsError

STAGE = {"model": {"vision": {"name": "tiny"}, "llm": {"name": "tiny"}}, "data": {"sources": [{"path": "/d.json"}]}}
SAMPLED = {"sources": [{"path": "/d.json", "sampling": {"num_frames": 4}}]}


def test_by_default_every_temporal_module_meets_every_seed_and_the_questions_are_checked_once(tmp_path: Path) -> None:
    trials = list_trials(compare_settings(tmp_path))
    assert [trial.name for trial in trials] == [
        "v1-seed0",
        "v2-seed0",
        "v3-seed0",
        "text-only-seed0",
        "one-frame-seed0",
        "v1-seed1",
        "v2-seed1",
        "v3-seed1",
    ]
    assert [trial.baseline for trial in trials].count(True) == 2
    by_name = {trial.name: trial.stages.finetune for trial in trials}
    assert (by_name["v2-seed1"].model.temporal, by_name["v2-seed1"].seed) == ("v2", 1)
    assert by_name["text-only-seed0"].data.blind
    assert by_name["one-frame-seed0"].data.sampling.num_frames == 1
    uris = {stage.tracking.uri for trial in trials for stage in trial.stages.stages.values()}
    assert uris == {f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"}
    assert len({trial.stages.stages["finetune"].output for trial in trials}) == len(trials)


@pytest.mark.parametrize("preset", preset_names(CompareSettings))
def test_every_preset_of_comparisons_is_three_variants_with_two_seeds_and_two_checks(preset: str) -> None:
    settings = load_settings(CompareSettings, preset)
    trials = list_trials(settings)
    assert [len({trial.variant for trial in trials if trial.baseline is checks}) for checks in (False, True)] == [3, 2]
    assert {trial.seed for trial in trials} == {0, 1}
    assert settings.finetune.data.validation.questions > 0


def test_both_stages_take_a_setting_and_one_takes_its_own(tmp_path: Path) -> None:
    search = {"model.temporal": ["v1", "v3"], "finetune.train.learning_rate": [1e-3, 1e-4]}
    trials = list_trials(compare_settings(tmp_path, pretrain=STAGE, search=search, baselines={}, seeds=[7]))
    assert [trial.variant for trial in trials] == [
        f"temporal={temporal} learning_rate={rate}" for temporal in ("v1", "v3") for rate in (0.001, 0.0001)
    ]
    for trial in trials:
        first, second = trial.stages.pretrain, trial.stages.finetune
        assert first is not None
        assert first.model.temporal == second.model.temporal == trial.point["model.temporal"]
        assert (first.train.learning_rate, second.train.learning_rate) == (
            2e-3,
            trial.point["finetune.train.learning_rate"],
        )
        assert first.seed == second.seed == 7


def test_draws_from_ranges_are_the_same_each_time_and_within_them(tmp_path: Path) -> None:
    search = {
        "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "data.sampling.max_frames": {"low": 2, "high": 5},
        "model.temporal": ["v1", "v2"],
    }
    settings = compare_settings(tmp_path, search=search, draws=20, baselines={}, seeds=[3])
    trials = list_trials(settings)
    assert [trial.point for trial in trials] == [trial.point for trial in list_trials(settings)]
    assert len(trials) == 40
    rates = {trial.point["train.learning_rate"] for trial in trials}
    assert len(rates) == 20
    assert 1e-5 <= min(rates) < 1e-4 < 1e-3 < max(rates) <= 1e-2
    assert {trial.stages.finetune.data.sampling.max_frames for trial in trials} == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"search": {"model.tempral": ["v1"]}}, "model.tempral: unknown setting; did you mean temporal"),
        ({"search": {"model.temporal": ["v1", "v9"]}}, "temporal: no such temporal module"),
        ({"search": {"pretrain.seed": [1]}}, "there is no pretrain in this comparison"),
        ({"search": {"model.temporal": ["v1", "v1"]}}, "several trials would be called v1-seed0, v1-seed1"),
        ({"pretrain": STAGE, "search": {"finetune.model.temporal": ["v1"]}}, "no effect, for this stage begins with a"),
        ({"finetune": {**STAGE, "model": {"path": "/saved"}}}, "model.temporal: has no effect"),
        ({"finetune": {**STAGE, "data": SAMPLED}}, "data.sampling.mode: has no effect on data.sources"),
        ({"baselines": {"odd": {"data.nonsense": 1}}}, "search: odd: data.nonsense: unknown setting"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_runs(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")):
        list_trials(compare_settings(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"stopping": True},
        {"pretrain": {**STAGE, "cluster": {"num_workers": 0}}},
        {"search": {}},
        {"seeds": []},
        {"seeds": [1, 1]},
        {"search": {"a": {"low": 2, "high": 1}}},
        {"concurrent": 0},
    ],
    ids=str,
)
def test_a_comparison_of_nothing_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        compare_settings(tmp_path, **changes)


def test_trials_with_one_tower_share_a_store_and_files_are_encoded_once(tmp_path: Path) -> None:
    settings = compare_settings(tmp_path, pretrain=STAGE)
    trials = list_trials(settings)
    stores = {stage.features for trial in trials for stage in trial.stages.stages.values()}
    assert stores - {""} == {job.features for job in list_encodings(trials, settings)}
    assert len(stores - {""}) == 1
    assert {trial.name for trial in trials if not trial.stages.finetune.features} == {"text-only-seed0"}
    samplings = {job.data.sampling.num_frames for job in list_encodings(trials, settings)}
    assert samplings == {8, 1}

    layers = compare_settings(tmp_path, search={"model.vision.layer": [-1, -2]}, baselines={})
    assert len({job.features for job in list_encodings(list_trials(layers), layers)}) == 2

    own = compare_settings(tmp_path, finetune={**STAGE, "features": "/mine"})
    assert {trial.stages.finetune.features for trial in list_trials(own)} == {"/mine", ""}
    assert list_encodings(list_trials(own), own) == []

    none = compare_settings(tmp_path, share_features=False)
    assert list_encodings(list_trials(none), none) == []


def test_checkpoints_elsewhere_lie_apart_by_trial_and_stage(tmp_path: Path) -> None:
    stage = {**STAGE, "checkpoint": {"path": "s3://bucket/mine/"}}
    trials = list_trials(compare_settings(tmp_path, finetune=stage))
    places = [trial.stages.finetune.checkpoint.path for trial in trials]
    assert places[0] == "s3://bucket/mine/v1-seed0/finetune"
    assert len(set(places)) == len(trials)
