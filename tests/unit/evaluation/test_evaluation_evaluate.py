"""Asking questions of whoever answers: every one reaches it with its picture, and is judged by its choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_makers import new_model, processor

from valley.errors import ModelError, SettingsError
from valley.evaluation.answerer import ModelAnswerer
from valley.evaluation.evaluate import evaluate, run_evaluation
from valley.evaluation.settings import EvaluationSettings
from valley.media.sampling import Sampling
from valley.model.video_processing import Framing

GREYS = {"black": 0, "grey": 128, "white": 255}


class Fake:
    """Answers by a rule from what it sees: the brightness of the picture."""

    sampling = Sampling()
    framing: Framing = {"size_px": 28, "interpolation": "bicubic", "resize_mode": "shortest"}

    def __init__(self, rule: Callable[[int], str]) -> None:
        self._rule = rule
        self.batches: list[int] = []

    def __call__(self, conversations: Sequence[Sequence[Any]]) -> list[str]:
        self.batches.append(len(conversations))
        assert all(messages[-1]["role"] == "user" for messages in conversations), "the answer is not given away"
        return [self._rule(int(messages[-1]["content"][0]["image"].mean())) for messages in conversations]


def question(name: str, grey: str, folder: Path) -> dict[str, Any]:
    Image.fromarray(np.full((40, 40, 3), GREYS[grey], dtype=np.uint8)).save(folder / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhich grey?"}, {"from": "gpt", "value": f"It is {grey}."}]
    return {
        "id": name,
        "image": f"{name}.png",
        "conversations": turns,
        "kind": "grey",
        "answer": grey,
        "choices": list(GREYS),
    }


def settings_for(records: Sequence[Any], folder: Path, **changes: Any) -> EvaluationSettings:
    (folder / "questions.json").write_text(json.dumps(records))
    fields = {
        "model": str(folder / "model"),
        "questions": str(folder / "questions.json"),
        "output": str(folder / "out"),
    }
    return EvaluationSettings.model_validate(fields | {"batch": 4, "device": "cpu"} | changes)


def kinds(settings: EvaluationSettings) -> Any:
    return json.loads((Path(settings.output) / "summary.json").read_text())["kinds"]


def test_who_sees_is_always_right_and_who_always_says_the_same_is_right_by_chance(tmp_path: Path) -> None:
    records = [question(f"q{index}", list(GREYS)[index % 3], tmp_path) for index in range(9)]
    settings = settings_for(records, tmp_path)
    seeing = Fake(lambda mean: next(f"It is {name}." for name, value in GREYS.items() if abs(value - mean) < 9))

    evaluate(seeing, settings)
    assert seeing.batches == [4, 4, 1]
    assert (kinds(settings)["grey"]["accuracy"], kinds(settings)["grey"]["num_questions"]) == (1.0, 9)

    table = evaluate(Fake(lambda mean: "It is grey."), settings)
    grey = kinds(settings)["grey"]
    assert grey["accuracy"] == pytest.approx(grey["chance"]) == pytest.approx(1 / 3)
    assert "| grey | 9 | 0.333 | 0.121 to 0.646 | 0.333 |" in table
    answers = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert [row["id"] for row in answers if row["right"]] == ["q1", "q4", "q7"]


def test_what_cannot_be_asked_is_listed_and_the_rest_is_asked(tmp_path: Path) -> None:
    good, damaged, wrong = (question(name, "grey", tmp_path) for name in ("good", "damaged", "wrong"))
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    settings = settings_for([good, damaged, wrong | {"answer": "red"}, "text"], tmp_path)
    evaluate(Fake(lambda mean: "grey"), settings)

    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["kinds"]["grey"]["num_questions"] == 1
    assert [reason.partition(":")[0] for reason in summary["rejected"]] == ["wrong", "#3", "damaged"]
    with pytest.raises(SettingsError, match="nothing to ask: damaged: "):
        evaluate(Fake(lambda mean: "grey"), settings_for([damaged], tmp_path))


def test_a_saved_model_answers_in_batches_as_it_does_alone(tmp_path: Path) -> None:
    new_model().save_pretrained(tmp_path / "model")
    processor().save_pretrained(tmp_path / "model")
    records = [question(f"q{index}", list(GREYS)[index % 3], tmp_path) for index in range(3)]
    records[1]["conversations"][0]["value"] = "Which of the many greys is this one, please?\n<image>"
    given = []
    for batch in (1, 3):
        settings = settings_for(records, tmp_path, batch=batch, output=str(tmp_path / str(batch)), max_new_tokens=5)
        run_evaluation(settings)
        given.append([row["answer"] for row in json.loads((tmp_path / str(batch) / "answers.json").read_text())])
    assert given[0] == given[1]
    assert any(given[0])


def test_a_folder_without_a_model_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model: there is no .*nothing"):
        ModelAnswerer(str(tmp_path / "nothing"), device=torch.device("cpu"), max_new_tokens=4)


class Watcher(Fake):
    """Answers by the order of the frames it is shown, and remembers them."""

    sampling = Sampling(mode="fixed", num_frames=6)

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, conversations: Sequence[Sequence[Any]]) -> list[str]:
        for messages in conversations:
            clips = [part["video"] for part in messages[-1]["content"] if part["type"] == "video"]
            self.seen.append([int(frame.mean()) for clip in clips for frame in clip])
        return ["brighter" for _ in conversations]


def test_frames_are_shown_in_order_shuffled_or_not_at_all(tmp_path: Path) -> None:
    records = []
    for number in range(12):
        names = [f"{number}-{level}.png" for level in range(6)]
        for level, name in enumerate(names):
            Image.fromarray(np.full((40, 40, 3), 40 * level, dtype=np.uint8)).save(tmp_path / name)
        turns = [{"from": "human", "value": "<video>\nWhich way?"}, {"from": "gpt", "value": "It gets brighter."}]
        records.append(
            {
                "id": f"q{number}",
                "video": names,
                "conversations": turns,
                "kind": "way",
                "answer": "brighter",
                "choices": ["brighter", "darker"],
                "pair": "the pair",
                "single_frame": False,
                "duration_s": 3,
            }
        )
    seen = {}
    for frames in ("all", "shuffled", "none"):
        for again in (False, True):
            watcher = Watcher()
            evaluate(watcher, settings_for(records, tmp_path, frames=frames))
            assert seen.setdefault(frames, watcher.seen) == watcher.seen, "the same each time"
            assert again or len(watcher.seen) == 12
    assert seen["all"] == [[0, 40, 80, 120, 160, 200]] * 12
    assert all(sorted(order) == seen["all"][0] for order in seen["shuffled"])
    assert len({tuple(order) for order in seen["shuffled"]}) > 8
    assert seen["none"] == [[]] * 12
    rows = json.loads((tmp_path / "out" / "answers.json").read_text())
    assert {(row["pair"], row["single_frame"], row["duration_s"]) for row in rows} == {("the pair", False, 3.0)}
