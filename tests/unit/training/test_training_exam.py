"""Questions asked while a model is trained are those of the evaluation, and are judged alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparison_makers import colour_stage

from valley.config import validate
from valley.evaluation.evaluate import run_evaluation
from valley.evaluation.settings import EvaluationSettings
from valley.training.job import prepare_job
from valley.training.run import run_plain
from valley.training.settings import RunSettings
from valley.training.tracking import read_curve
from valley.training.validation import ACCURACY, find_questions


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSettings:
    folder = tmp_path_factory.mktemp("exam")
    tree = colour_stage(folder, output=str(folder / "run"), tracking={"enabled": False})
    settings = validate(RunSettings, tree)
    run_plain(settings)
    return settings


def test_the_last_point_of_the_curve_is_what_an_evaluation_of_the_model_finds(run: RunSettings) -> None:
    folder = Path(run.output)
    asked = EvaluationSettings(
        model=str(folder / "model"),
        questions=run.data.validation.sources[0].path,
        output=str(folder / "evaluation"),
        device="cpu",
    )
    run_evaluation(asked)
    kinds = json.loads((folder / "evaluation" / "summary.json").read_text())["kinds"]
    curves = {name: read_curve(folder / "metrics.jsonl", f"{ACCURACY}/{name}") for name in kinds}
    assert {name: list(curve.values())[-1] for name, curve in curves.items()} == {
        name: kind["accuracy"] for name, kind in kinds.items()
    }
    right = sum(kind["num_right"] for kind in kinds.values())
    total = read_curve(folder / "metrics.jsonl", ACCURACY)
    assert list(total.values())[-1] == pytest.approx(right / 16)
    assert list(total) == [8, 16, 24, 32]


def test_the_model_learns_the_colours(run: RunSettings) -> None:
    """Else the comparison above could hold for a model that knows nothing."""
    assert list(read_curve(Path(run.output) / "metrics.jsonl", ACCURACY).values())[-1] > 0.6


def test_a_blind_run_sees_the_same_words_and_no_picture(run: RunSettings, tmp_path: Path) -> None:
    data = run.data.model_copy(update={"blind": True})
    seeing, blind = (
        prepare_job(run.model_copy(update={"output": str(tmp_path / name), "data": some})).loader
        for name, some in (("seeing", run.data), ("blind", data))
    )
    for slot in range(8):
        with_picture, without = seeing.load(slot), blind.load(slot)
        assert (with_picture.row, len(with_picture.frames), len(without.frames)) == (without.row, 1, 0)
        assert len(without.num_frames) == 0
        decode = blind.encoder.tokenizer.decode
        assert decode(without.labels[without.labels >= 0]) == decode(with_picture.labels[with_picture.labels >= 0])
        assert "Which colour?" in decode(without.input_ids)
        assert "<im_start>" in decode(with_picture.input_ids)
        assert "<im_start>" not in decode(without.input_ids)


def test_the_same_questions_are_asked_whatever_the_seed(run: RunSettings, tmp_path: Path) -> None:
    asked = {}
    for seed in (0, 1):
        job = prepare_job(run.model_copy(update={"output": str(tmp_path), "seed": seed}))
        assert job.held_out is not None
        found = dict(find_questions(job.held_out, 5))
        asked[seed] = {question.record.id for question in found.values()}
        loaded = {job.held_out.load(slot).sample_id: question.record.id for slot, question in found.items()}
        assert all(sample == question for sample, question in loaded.items())
    assert asked[0] == asked[1]
    assert len(asked[0]) == 5
