"""The report says what the answers allow, and no more."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from comparison_makers import compare_settings, write_trial
from PIL import Image

from valley.comparison.compare import conclude, open_comparison, plan_comparison
from valley.comparison.report import conclusion, make_tables, write_report
from valley.comparison.results import Results
from valley.comparison.settings import CompareSettings
from valley.comparison.trial import is_stopped, mark_stopped
from valley.comparison.trials import Trial, list_trials
from valley.errors import ComparisonError, SettingsError

OFF = {"enabled": False}


def answers(share: float, seed: str, number: int = 200) -> np.ndarray:
    return np.random.default_rng(list(seed.encode())).random(number) < share


def finish(trials: list[Trial], shares: dict[str, float], *, shuffled: float | None = 0.25) -> None:
    """Direction as `shares` says, colour always 0.9; baselines at chance."""
    for trial in trials:
        share = shares.get(trial.variant)
        if share is not None:
            chances = {"colour": 0.9, "direction": share}
            parts = {kind: answers(chance, f"{trial.name} {kind}") for kind, chance in chances.items()}
            write_trial(trial, lambda kind, parts=parts: parts[kind], shuffled=shuffled)


class References(HTMLParser):
    """What a page would fetch from elsewhere."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {value}" for name, value in attributes if name in ("src", "href")]


@pytest.fixture
def settings(tmp_path: Path) -> CompareSettings:
    plain = compare_settings(tmp_path)
    tracking = plain.finetune.tracking.model_copy(update={"enabled": False})
    return plain.model_copy(update={"finetune": plain.finetune.model_copy(update={"tracking": tracking})})


def test_a_clear_winner_is_named_and_equals_are_not_told_apart(settings: CompareSettings) -> None:
    trials = list_trials(settings.model_copy(update={"seeds": [0, 1, 2, 3]}))
    finish(trials, {"v1": 0.3, "v2": 0.3, "v3": 0.8, "text only": 0.25})
    said = conclusion(Results(trials))
    assert "v3 is right more often than v1" in said
    assert "direction: v3 is right more often than v2" in said
    assert "No difference is shown between v2 and v1 (" in said
    assert "colour: v" not in said
    assert "4 seeds each" in said


def test_where_nothing_is_shown_nothing_is_claimed(settings: CompareSettings) -> None:
    trials = list_trials(settings.model_copy(update={"seeds": [0]}))
    finish(trials, {"v1": 0.50, "v2": 0.52, "v3": 0.54})
    said = conclusion(Results(trials))
    assert said.startswith("Over all questions, no variant is shown to be better than another.")
    assert "says nothing of other seeds" in said


def test_the_tables_hold_every_variant_and_kind_and_what_checks_the_questions(settings: CompareSettings) -> None:
    trials = list_trials(settings)
    finish(trials, {"v1": 0.3, "v2": 0.4, "v3": 0.8, "text only": 0.25, "one frame": 0.25})
    right, pairs, checks = make_tables(Results(trials))
    assert right.header[:4] == ("variant", "colour", "direction", "all")
    assert [row[0] for row in right.rows] == ["v1", "v2", "v3"]
    assert right.rows[0][-4:] == ("2", "1.2", "56,789", "1,234")
    assert len(pairs.rows) == 9
    assert checks.header[4:] == ("text only", "one frame", *(f"{v}, frames shuffled" for v in ("v1", "v2", "v3")))
    direction = next(row for row in checks.rows if row[0] == "direction")
    assert direction[1:4] == ("200", "no", "0.250")
    assert 0.15 < float(direction[6][:5]) < 0.35


def test_questions_that_one_trial_lacks_count_for_none(settings: CompareSettings) -> None:
    trials = list_trials(settings)
    finish(trials[:2], {"v1": 0.5, "v2": 0.5}, shuffled=None)
    file = trials[0].folder / "evaluation" / "answers.json"
    file.write_text(json.dumps(json.loads(file.read_text())[10:]))
    results = Results(trials)
    assert len(results.questions) == 390
    assert {cell.num_questions for cell in map(results.cell, results.variants) if cell} == {390}


def test_the_report_is_pictures_text_and_a_page_that_needs_nothing_else(
    settings: CompareSettings, tmp_path: Path
) -> None:
    trials = list_trials(settings)
    finish(trials, {"v1": 0.3, "v2": 0.4, "v3": 0.8})
    files = write_report(Results(trials), tmp_path, title="<Ours>", stopped=trials[3:4])
    pictures = [file for file in files if file.suffix == ".png"]
    assert {file.stem for file in pictures} == {f"accuracy_by_{what}" for what in ("step", "kind", "length", "cost")}
    for file in pictures:
        with Image.open(file) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    page = (tmp_path / "report.html").read_text()
    assert "&lt;Ours&gt;" in page
    assert "text-only-seed0" in page
    assert not References(page).found
    assert page.count("</script>") == 1
    assert "| v3 |" in (tmp_path / "report.md").read_text()


def test_the_end_names_the_best_trial_and_writes_it_down(settings: CompareSettings) -> None:
    trials = list_trials(settings)
    finish(trials, {"v1": 0.3, "v2": 0.4, "v3": 0.8})
    todo, run = open_comparison(settings.model_copy(update={"resume": True}), trials)
    assert [trial.variant for trial in todo] == ["text only", "one frame"]
    text = conclude(settings, trials, run)
    summary = json.loads((Path(settings.output) / "summary.json").read_text())
    assert summary["best"].startswith("v3-seed")
    assert summary["best_checkpoint"] in text
    assert summary["registered"] is None
    assert summary["accuracy"]["v3"]["direction"] > 0.7
    assert len(summary["trials"]) == 6


def test_failed_trials_are_told_and_the_others_reported(settings: CompareSettings) -> None:
    trials = list_trials(settings)
    with pytest.raises(ComparisonError, match="no trial of any variant was finished\n  v1-seed0: out of memory"):
        conclude(settings, trials, None, ["v1-seed0: out of memory"])
    finish(trials, {"v1": 0.3})
    with pytest.raises(ComparisonError, match=r"report of the others, .*report\.html"):
        conclude(settings, trials, None, ["v2-seed0: out of memory"])
    assert (Path(settings.output) / "report.html").exists()
    assert not (Path(settings.output) / "summary.json").exists()


def test_an_unfinished_comparison_goes_on_only_when_asked_to_and_with_the_same_trainings(
    settings: CompareSettings,
) -> None:
    trials = list_trials(settings)
    open_comparison(settings, trials)
    with pytest.raises(SettingsError, match="go on with --resume"):
        open_comparison(settings, trials)
    again = settings.model_copy(update={"resume": True, "seeds": [0, 1, 2]})
    finish(trials, {"v1": 0.5})
    todo, _ = open_comparison(again, list_trials(again))
    assert "v1-seed0" not in {trial.name for trial in todo}
    assert {trial.name for trial in todo} >= {"v1-seed2", "v3-seed1"}
    point = {"model.temporal": ["v1", "v3"]}
    renamed = again.model_copy(update={"search": point})
    file = Path(settings.output) / "trials" / "v1-seed0" / "result.json"
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"point": {"pretrain.model.temporal": "v1"}}))
    with pytest.raises(SettingsError, match="v1-seed0 was run with"):
        open_comparison(renamed, list_trials(renamed))
    file.write_text(json.dumps(result))
    train = settings.finetune.train.model_copy(update={"learning_rate": 0.5})
    other = again.model_copy(update={"finetune": settings.finetune.model_copy(update={"train": train})})
    with pytest.raises(SettingsError, match="finetune: not as it was"):
        open_comparison(other, list_trials(other))


def test_a_finished_comparison_is_moved_aside_by_a_new_one(settings: CompareSettings) -> None:
    trials = list_trials(settings)
    open_comparison(settings, trials)
    finish(trials, {"v1": 0.5})
    conclude(settings, trials, None)
    todo, _ = open_comparison(settings, trials)
    assert len(todo) == len(trials)
    assert (Path(settings.output) / "trials.previous" / "v1-seed0" / "result.json").exists()


def test_stopped_trials_stay_stopped_and_count_for_nothing(settings: CompareSettings) -> None:
    trials = list_trials(settings)
    finish(trials, {"v1": 0.5, "text only": 0.2, "one frame": 0.2})
    for trial in trials:
        if trial.variant in ("v2", "v3"):
            trial.folder.mkdir(parents=True)
            mark_stopped(trial, 40)
    assert is_stopped(trials[1])
    todo, run = open_comparison(settings.model_copy(update={"resume": True}), trials)
    assert todo == []
    conclude(settings, trials, run)
    summary = json.loads((Path(settings.output) / "summary.json").read_text())
    assert set(summary["stopped"]) == {"v2-seed0", "v3-seed0", "v2-seed1", "v3-seed1"}


def test_the_plan_lists_trials_without_running_them(settings: CompareSettings, tmp_path: Path) -> None:
    (tmp_path / "questions.json").write_text("[]")
    text = plan_comparison(settings.model_copy(update={"share_features": False}))
    assert text.startswith("8 trials, 1 at a time")
    assert "text-only-seed0 (checks the questions)" in text
    assert not Path(settings.output).exists()
