"""Settings: presets, overrides, and errors that name every problem at once."""

from pathlib import Path

import pytest

from valley.command import parse_command
from valley.config import load_settings, preset_names, read_config
from valley.errors import SettingsError
from valley.training.settings import RunSettings
from valley.training.two_stages import TwoStages

SOURCES = "data.sources=[{path: my.json, root: videos/}]"


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_a_whole_run(preset: str) -> None:
    assert load_settings(RunSettings, preset).data.sources


@pytest.mark.parametrize("preset", preset_names(TwoStages))
def test_every_preset_of_two_stages_is_two_whole_runs(preset: str) -> None:
    settings = load_settings(TwoStages, preset, ["output=/runs/both", "finetune.train.epochs=7"])
    first, second = settings.stages.values()
    assert first.output == "/runs/both/pretrain"
    assert second.model.path == "/runs/both/pretrain/model"
    assert first.train.modules == ["temporal", "projector"]
    assert second.train.modules == ["temporal", "projector", "llm"]
    assert (first.train.epochs == 7, second.train.epochs) == (False, 7)
    assert settings.planned["finetune"].model == first.model


def test_the_second_stage_is_the_papers() -> None:
    train = load_settings(RunSettings, "valley-7b-finetune").train
    assert (train.learning_rate, train.global_batch, train.epochs) == (2e-5, 32, 3)


@pytest.mark.parametrize(("word", "rank"), [("lora=true", 64), ("lora.rank=8", 8), ("lora=false", None)])
def test_a_low_rank_update_is_asked_for_in_a_word_or_by_its_settings(word: str, rank: int | None) -> None:
    lora = load_settings(RunSettings, "tiny-finetune", [word]).lora
    assert (lora.rank if lora else None) == rank


def test_what_may_be_several_things_is_one_problem() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(RunSettings, "tiny", ["cluster.num_workers=-1"])
    (problem,) = caught.value.problems
    assert problem.startswith("cluster.num_workers: input should be greater than or equal to 0, found -1 or ")


def test_the_defaults_are_the_papers_first_stage() -> None:
    train = load_settings(RunSettings, None, [SOURCES]).train
    assert (train.learning_rate, train.global_batch, train.epochs, train.betas, train.eps) == (
        2e-3,
        128,
        1,
        (0.9, 0.95),
        1e-6,
    )
    assert train.modules == ["temporal", "projector"]


def test_an_override_wins_over_a_file_and_a_file_over_what_it_extends(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("extends: tiny\ntrain: {learning_rate: 1e-4, epochs: 7}\n")
    settings = load_settings(RunSettings, str(config), ["train.epochs=2"])
    assert (settings.train.learning_rate, settings.train.epochs, settings.train.global_batch) == (1e-4, 2, 16)


def test_a_value_the_shell_split_at_its_spaces_is_joined_again() -> None:
    words = ["data.sources=[{path:", "my.json,", "root:", "videos/}]", "seed=3"]
    settings = load_settings(RunSettings, "tiny", words)
    assert [Path(source.path).name for source in settings.data.sources] == ["my.json"]
    assert settings.seed == 3


def test_what_names_an_idle_module_is_refused_without_repeating_all_settings() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(RunSettings, "tiny", ["train.module_learning_rates={llm: 1e-5}"])
    assert caught.value.problems == ("train: module_learning_rates names what does not train: llm",)


def test_a_bracket_in_a_text_is_not_the_beginning_of_a_list() -> None:
    settings = load_settings(RunSettings, "tiny", ["model.system=say (a [ b) only", "train.max_steps=5"])
    assert (settings.model.system, settings.train.max_steps) == ("say (a [ b) only", 5)


def test_a_name_is_a_path_where_something_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VALLEY_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    llms = [
        load_settings(RunSettings, "tiny", [f"model.llm.name={name}"]).model.llm for name in ("weights", "some/hub")
    ]
    assert [llm.name for llm in llms] == [str(tmp_path / "weights"), "some/hub"]


def test_an_item_of_a_list_can_be_overridden() -> None:
    settings = load_settings(RunSettings, "tiny", ["data.sources.1.weight=2.5"])
    assert settings.data.sources[1].weight == 2.5


def test_all_problems_are_reported_at_once_with_path_and_choices() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(
            RunSettings,
            "tiny",
            [
                "seed",
                "train.learning_rat=1",
                "engine.name=jax",
                "data.sources.0.wieght=2",
                "model.temporal=v9",
                "train.modules=[]",
                "train.betas=[1.5, 2]",
            ],
        )
    problems = caught.value.problems
    assert len(problems) == 8
    assert "model.temporal: no such temporal module; known: v1, v2, v3, v3_table, found 'v9'" in problems
    assert any("train.learning_rat: unknown setting; did you mean learning_rate?" in line for line in problems)
    assert any("engine.name" in line and "'deepspeed' or 'torch'" in line for line in problems)
    assert any("data.sources.0.wieght" in line and "known here: path, root" in line for line in problems)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed"], "expected dotted.path=value"),
        (["data.sources.9.weight=1"], "9 is not an index of a list of 2"),
        (["seed.deeper.still=1", "seed=[1"], "not YAML"),
    ],
)
def test_a_malformed_override_says_what_is_wrong(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(RunSettings, "tiny", words)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"presets are scenes, smol, smol-finetune, tiny, .*, valley-7b-lora"):
        read_config("huge")


def test_relative_paths_are_taken_from_valley_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VALLEY_HOME", str(tmp_path))
    settings = load_settings(RunSettings, "tiny", ["output=runs/x", "data.sources.0.root=s3://bucket/videos"])
    assert settings.output == str(tmp_path / "runs/x")
    assert settings.data.sources[0].root == "s3://bucket/videos"


def test_a_submitted_job_may_not_write_into_its_scratch_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VALLEY_HOME", raising=False)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(SettingsError, match=r"output: .*scratch directory"):
        load_settings(RunSettings, "tiny")


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(SettingsError, match="--dryrun: unknown option"):
        parse_command(RunSettings, "", ["--config", "tiny", "--dryrun"])


def test_help_shows_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(RunSettings, "Trains.", ["--help"])
    text = capsys.readouterr().out
    assert "train.learning_rate = 0.002" in text
    assert "data.limits.damaged = reject" in text
