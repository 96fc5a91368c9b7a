"""Attributes come in equal shares, independent of each other and of every answer."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from valley.data.scenes import KINDS
from valley.data.scenes.motion import State
from valley.data.scenes.plan import plan_scenes
from valley.data.scenes.questions import Question, ask
from valley.data.scenes.scene import COLOURS, SHAPES, Scene


@pytest.fixture(scope="module")
def train() -> list[Scene]:
    return plan_scenes("train", 1000, seed=5, kinds=tuple(KINDS))


@pytest.fixture(scope="module")
def heldout() -> list[Scene]:
    return plan_scenes("heldout", 2000, seed=5, kinds=tuple(KINDS))


@pytest.fixture(scope="module")
def asked(heldout: list[Scene]) -> list[tuple[Scene, Question]]:
    return [(scene, question) for scene in heldout for question in ask(scene)]


@pytest.mark.parametrize("num_clips", [600, 150])
def test_every_answer_of_a_kind_comes_equally_often(num_clips):
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in plan_scenes("heldout", num_clips, seed=9, kinds=tuple(KINDS)):
        for question in ask(scene):
            answer = question.choices.index(question.answer) if question.kind == "order" else question.answer
            counts[question.kind][answer] += 1
            assert len(question.choices) == {"colour": 8, "shape": 6, "count": 4, "direction": 4}.get(question.kind, 2)
    assert {kind: len(answers) for kind, answers in counts.items()} == {
        "colour": 8,
        "shape": 6,
        "count": 4,
        "direction": 4,
        "size": 2,
        "order": 2,
    }
    for answers in counts.values():
        assert max(answers.values()) - min(answers.values()) <= 2  # a pair of twins cannot be split


def test_twins_differ_in_nothing_but_the_order_of_their_pictures_and_have_opposite_answers(heldout):
    pairs = defaultdict(list)
    for scene in heldout:
        pairs[scene.pair].append(scene)
    opposite = {"left": "right", "up": "down", "growing": "shrinking"}
    opposite |= {value: key for key, value in opposite.items()}
    seen = Counter()
    for one, other in (twins for twins in pairs.values() if twins[0].design not in ("still", "count")):
        assert one.backwards != other.backwards
        assert replace(one, id="", kinds=(), backwards=False) == replace(other, id="", kinds=(), backwards=False)
        for index in (0, 1, one.num_frames - 1):
            assert one.stage_time(index) == other.stage_time(one.num_frames - 1 - index)
        for left, right in zip(timed(one), timed(other), strict=True):
            seen[left.kind] += 1
            assert left.text == right.text
            if left.kind == "order":
                assert {left.answer, right.answer} == set(left.choices)
            else:
                assert opposite[left.answer] == right.answer
    assert min(seen[kind] for kind in ("direction", "size", "order")) > 120


def timed(scene: Scene):
    return [question for question in ask(scene) if not KINDS[question.kind].single_frame]


def test_heldout_twins_share_the_questions_that_one_picture_answers(heldout):
    asked = Counter((scene.pair, kind) for scene in heldout for kind in scene.kinds if KINDS[kind].single_frame)
    assert set(asked.values()) == {1}


def test_whatever_one_picture_should_answer_is_in_sight_all_the_time(heldout):
    for scene in heldout:
        if any(KINDS[kind].single_frame for kind in scene.kinds):
            for state in (state for time_s in range(scene.span_s + 1) for state in scene.states(float(time_s))):
                assert state.opacity == 1
                assert max(abs(state.x), abs(state.y)) + state.radius <= 1


def test_training_clips_are_asked_everything_they_can_answer(train):
    assert {scene.kinds for scene in train if scene.design == "slide"} <= {
        ("direction", "colour", "shape"),
        ("direction", "shape", "colour"),
    }


def test_the_last_picture_stands_at_a_multiple_of_two_seconds(train):
    for scene in train:
        assert (scene.num_frames - 1) / scene.fps == scene.span_s
        assert scene.span_s % 2 == 0
        assert 4 <= scene.duration_s <= 24.2


ATTRIBUTES = {
    "colour": lambda scene: scene.actors[0].colour,
    "shape": lambda scene: scene.actors[0].shape,
    "pattern": lambda scene: scene.background.pattern,
    "size": lambda scene: scene.width,
    "fps": lambda scene: scene.fps,
    "span": lambda scene: scene.span_s,
    "gop": lambda scene: scene.coding.gop,
    "radius": lambda scene: scene.actors[0].rest.radius > (0.21 if scene.design == "count" else 0.27),
    "left": lambda scene: scene.actors[0].rest.x < 0,
    "upper": lambda scene: scene.actors[0].rest.y < 0,
}


SUBJECTS = {
    "colour": {"colour"},
    "shape": {"shape"},
}
"""Attributes that are the answer to a kind of question."""


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_attribute_tells_the_answer(kind, asked):
    for name, attribute in ATTRIBUTES.items():
        if name in SUBJECTS.get(kind, ()):
            continue
        pairs = [(answer_of(question), str(attribute(scene))) for scene, question in asked if question.kind == kind]
        if len({value for _, value in pairs}) == 1:
            continue
        statistic, freedom = chi_square(pairs)
        # the 0.998 quantile of chi-square, by Wilson and Hilferty: that of 2.9 standard deviations
        quantile = freedom * (1 - 2 / (9 * freedom) + 2.878 * (2 / (9 * freedom)) ** 0.5) ** 3
        # Two decks, each without repeats, meet in a table that spreads this much wider than one of independent draws.
        sides = [len(set(column)) for column in zip(*pairs, strict=True)]
        assert statistic < quantile * (1 + 1 / (max(sides) - 1)), name


def answer_of(question: Question) -> str:
    """Of two named objects, which of them; else the answer itself."""
    return str(question.choices.index(question.answer)) if question.kind == "order" else question.answer


def chi_square(pairs: list[tuple[str, str]]) -> tuple[float, int]:
    rows, columns = sorted({a for a, _ in pairs}), sorted({b for _, b in pairs})
    table = np.zeros((len(rows), len(columns)))
    for a, b in pairs:
        table[rows.index(a), columns.index(b)] += 1
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    return float(((table - expected) ** 2 / expected).sum()), (len(rows) - 1) * (len(columns) - 1)


def test_objects_that_matter_stay_inside_the_central_square_and_apart(train):
    for scene in train[:400]:
        for time_s in np.linspace(0, scene.span_s, 9):
            states = scene.states(float(time_s))
            for actor, state in zip(scene.actors, states, strict=True):
                centre = {"x": abs(state.x), "y": abs(state.y)}
                if scene.design == "slide":
                    assert centre.pop(actor.motion.property) - 0.6 * state.radius <= 1.0
                assert max(centre.values()) + state.radius <= 1.0
            for number, state in enumerate(states):
                for other in states[:number]:
                    assert np.hypot(state.x - other.x, state.y - other.y) > touching(state, other)


def touching(one: State, other: State) -> float:
    return 0.95 * (one.radius + other.radius)


def test_objects_are_large_enough_to_be_seen_at_56_pixels(train):
    radii = [state.radius for scene in train for state in scene.states(0.0)]
    assert min(radii) * 56 / 2 > 3.9


def test_a_moving_object_moves_visibly_between_pictures_two_seconds_apart_but_never_half_a_turn(train):
    for scene in train:
        if scene.design in ("slide", "scale"):
            motion = scene.actors[0].motion
            assert 0.25 <= motion.turns <= 0.6
            assert motion.turns * 2 / scene.span_s <= 0.3


def test_between_two_events_there_is_a_sampled_picture(train):
    for scene in (scene for scene in train if scene.design == "order"):
        first, second = sorted(actor.motion.at_s for actor in scene.actors)
        assert any(first + 0.3 <= time_s <= second - 0.3 for time_s in range(0, scene.span_s + 1, 2))
        assert first - 0.3 > 0
        assert second + 0.3 < scene.span_s


def test_only_designs_that_carry_a_wanted_kind_are_made():
    scenes = plan_scenes("train", 41, seed=0, kinds=("order", "size"))
    assert len(scenes) == 41
    assert {(scene.design, scene.kinds) for scene in scenes} == {("order", ("order",)), ("scale", ("size",))}


def test_only_wanted_designs_patterns_and_lengths_are_used():
    scenes = plan_scenes(
        "heldout",
        60,
        seed=0,
        kinds=("shape", "direction"),
        designs=("still", "slide", "count"),
        patterns=("smooth",),
        longest_s=6,
    )
    assert {(scene.design, scene.kinds) for scene in scenes} == {("still", ("shape",)), ("slide", ("direction",))}
    assert {scene.background.pattern for scene in scenes} == {"smooth"}
    assert {scene.span_s for scene in scenes} == {4, 6}


@pytest.mark.parametrize("num_clips", [0, 1, 2, 3, 7, 33])
def test_small_and_odd_sets_have_the_number_of_clips_asked_for(num_clips):
    scenes = plan_scenes("train", num_clips, seed=0, kinds=tuple(KINDS))
    assert [scene.id for scene in scenes] == [f"train-{number:05d}" for number in range(num_clips)]


def test_the_seed_and_the_split_decide_everything():
    again = plan_scenes("train", 50, seed=3, kinds=tuple(KINDS))
    assert plan_scenes("train", 50, seed=3, kinds=tuple(KINDS)) == again
    assert plan_scenes("train", 50, seed=4, kinds=tuple(KINDS)) != again
    heldout = plan_scenes("heldout", 50, seed=3, kinds=tuple(KINDS))
    assert not {scene.background for scene in again} & {scene.background for scene in heldout}


def test_all_colours_and_shapes_occur(train):
    assert {actor.colour for scene in train for actor in scene.actors} == set(COLOURS)
    assert {actor.shape for scene in train for actor in scene.actors} == set(SHAPES)
