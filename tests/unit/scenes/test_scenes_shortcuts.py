"""Questions need what they ask: simple classifiers trained on less are at chance, and above it on the ordered pictures.

Pictures are painted, not encoded, at the times that 0.5 frames a second gives (0, 2, 4, ... s); that decoded frames show
no more is tested with the files.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from valley.data.scenes import KINDS
from valley.data.scenes.plan import plan_scenes
from valley.data.scenes.questions import Question, ask
from valley.data.scenes.render import Painter, paint_background
from valley.data.scenes.scene import Scene

GRID = 14
TIMED = [name for name, kind in KINDS.items() if not kind.single_frame]


@dataclass
class Item:
    """One question about one clip, with what the sampled pictures show."""

    scene: Scene
    question: Question
    grids: np.ndarray  # [T, GRID, GRID]: how much of each cell an object covers
    measures: np.ndarray  # [T, 3]: centre and scaled log size of what is covered

    @property
    def label(self) -> int:
        return self.question.choices.index(self.question.answer)


def look(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Where objects are in each sampled picture, found by comparing it with the empty stage."""
    painter, stage = Painter(scene), paint_background(scene.background, scene.width, scene.height).astype(int)
    grids, measures = [], []
    for index in range(0, scene.num_frames, 2 * scene.fps):
        picture = painter.paint(scene.stage_time(index))
        covered = np.abs(picture - stage).sum(-1) > 60
        rows, columns = np.nonzero(covered)
        cells, *_ = np.histogram2d(rows, columns, bins=GRID, range=[[0, scene.height], [0, scene.width]])
        grids.append(cells / (scene.width / GRID) ** 2)
        measures.append([columns.mean(), rows.mean(), 10 * np.log(len(rows))])
    return np.array(grids), np.array(measures)


@pytest.fixture(scope="module")
def items() -> dict[str, tuple[list[Item], list[Item]]]:
    """Training and held-out items of the two kinds that one object answers. A twin shows its pictures in reverse."""
    made: dict[str, tuple[list[Item], list[Item]]] = {}
    for kind in ("direction", "size"):
        halves = []
        for split, num_clips in (("train", 320), ("heldout", 200)):
            half = []
            for scene in plan_scenes(split, num_clips, seed=2, kinds=(kind,)):
                if not scene.backwards:
                    grids, measures = look(replace(scene, width=96, height=96))
                    twin = replace(scene, backwards=True)
                    half += [Item(scene, ask(scene)[0], grids, measures)]
                    half += [Item(twin, ask(twin)[0], grids[::-1], measures[::-1])]
            halves.append(half)
        made[kind] = (halves[0], halves[1])
    return made


def accuracy(train: list[np.ndarray], answers: list[int], heldout: list[np.ndarray], truth: list[int]) -> float:
    """Of a linear classifier (ridge regression to one-hot answers) on held-out items."""
    x, test = np.stack(train).astype(float), np.stack(heldout).astype(float)
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x, test = (x - mean) / scale, (test - mean) / scale
    x, test = np.c_[x, np.ones(len(x))], np.c_[test, np.ones(len(test))]
    targets = np.eye(max(answers) + 1)[answers]
    weights = np.linalg.solve(x.T @ x + 0.3 * len(x) * np.eye(x.shape[1]), x.T @ targets)
    return float(((test @ weights).argmax(1) == np.array(truth)).mean())


def probe(items: tuple[list[Item], list[Item]], features) -> float:
    train, heldout = items
    return accuracy(
        [features(item) for item in train],
        [item.label for item in train],
        [features(item) for item in heldout],
        [item.label for item in heldout],
    )


def margin(num_items: int, chance: float) -> float:
    """Three standard deviations of the accuracy of guessing; twins, which are guessed alike, count as one item."""
    return 3 * (chance * (1 - chance) / (num_items / 2)) ** 0.5


# One picture, by what there is to know of it: the state of its object, exactly, and all else that a viewer may see. That
# costs no painting, so there are enough scenes for a narrow margin. The two answers compared are opposite ones.


@dataclass
class Look:
    """What one picture shows of one object."""

    features: np.ndarray
    label: int


@pytest.fixture(scope="module")
def shown() -> dict[tuple[str, str], list[Scene]]:
    """One clip of each pair of twins, by lot."""
    lot = np.random.default_rng(0)
    return {
        (kind, split): [
            replace(scene, backwards=bool(lot.integers(2)))
            for scene in plan_scenes(split, 4000, seed=2, kinds=(kind,))
            if not scene.backwards
        ]
        for kind in ("direction", "size")
        for split in ("train", "heldout")
    }


def one_picture(scene: Scene, share: float) -> Look:
    """What the picture shows when this share of the clip has been played."""
    (state,) = scene.states(scene.stage_time(round(share * (scene.num_frames - 1))))
    seen = np.array([state.x, state.y, np.log(state.radius), scene.fps, scene.span_s, scene.width / scene.height])
    seen = np.r_[seen, seen[:3] ** 3, np.outer(seen, seen)[np.triu_indices(len(seen))]]
    along_y = scene.actors[0].motion.property == "y"
    return Look(np.r_[seen, along_y * seen], int(scene.changes()[0][1] in ("right", "down", "grow")))


@pytest.mark.parametrize("kind", ["direction", "size"])
@pytest.mark.parametrize("share", [0, 0.2, 0.7, 1])  # twins meet in the middle, where there is nothing to test
def test_one_picture_does_not_tell_how_an_object_moves_or_grows(kind, share, shown):
    train, heldout = ([one_picture(scene, share) for scene in shown[kind, split]] for split in ("train", "heldout"))
    assert len(heldout) == 2000
    guess = accuracy(
        [look.features for look in train],
        [look.label for look in train],
        [look.features for look in heldout],
        [look.label for look in heldout],
    )
    assert abs(guess - 0.5) < 2.5 * 0.5 / len(heldout) ** 0.5


@pytest.mark.parametrize("kind", ["direction", "size"])
def test_ordered_pictures_do(kind, items):
    def features(item: Item) -> np.ndarray:
        steps = np.diff(item.measures, axis=0)
        return np.take_along_axis(steps, np.abs(steps).argmin(0)[None], axis=0)[0]  # a step, not the jump back

    assert probe(items[kind], features) > 0.95


def test_pictures_without_their_order_tell_the_axis_but_not_the_way_along_it(items):
    def features(item: Item) -> np.ndarray:
        return np.r_[item.grids.mean(0).ravel(), item.measures.std(0)]

    assert 0.4 < probe(items["direction"], features) <= 0.5 + margin(len(items["direction"][1]), 0.5)
    assert abs(probe(items["size"], features) - 0.5) < margin(len(items["size"][1]), 0.5)


OBJECTS = (slice(0, 6), slice(6, 12))


def both(scene: Scene, question: Question, second: int) -> np.ndarray:
    """All there is to know about the two objects of an order scene at one time, in the order of the question."""
    states = dict(
        zip((actor.name for actor in scene.actors), scene.states(scene.stage_time(second * scene.fps)), strict=True)
    )
    return np.array(
        [
            value
            for seen in (states[name] for name in question.choices)
            for value in (seen.x, seen.y, abs(seen.x), abs(seen.y), seen.radius, seen.opacity)
        ]
    )


@pytest.fixture(scope="module")
def orders() -> list[list[tuple[Scene, Question]]]:
    return [
        [(scene, ask(scene)[0]) for scene in plan_scenes(split, 2000, seed=4, kinds=("order",))]
        for split in ("train", "heldout")
    ]


def order_probe(orders: list[list[tuple[Scene, Question]]], features) -> float:
    (train, labels), (heldout, truth) = (
        ([features(*item) for item in half], [question.choices.index(question.answer) for _, question in half])
        for half in orders
    )
    return accuracy(train, labels, heldout, truth)


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
def test_no_picture_of_two_objects_tells_which_changes_first(share, orders):
    """Even a probe that knows each object exactly, all their combinations, and when it is looking, is at chance."""

    def features(scene: Scene, question: Question) -> np.ndarray:
        flat = both(scene, question, round(share * scene.span_s))
        return np.r_[flat, np.outer(flat, flat)[np.triu_indices(len(flat))]]

    assert abs(order_probe(orders, features) - 0.5) < margin(2000, 0.5)


def test_all_pictures_in_order_tell_which_changes_first(orders):
    def features(scene: Scene, question: Question) -> np.ndarray:
        change = np.abs(np.diff([both(scene, question, second) for second in range(scene.span_s + 1)], axis=0))
        one, other = (change[:, columns].sum(1).argmax() for columns in OBJECTS)
        return np.array([float(one < other)])

    assert order_probe([half[:300] for half in orders], features) == 1.0


def test_the_words_of_a_question_do_not_tell_its_answer():
    train, heldout = (
        [question for scene in plan_scenes(split, 1600, seed=6, kinds=tuple(KINDS)) for question in ask(scene)]
        for split in ("train", "heldout")
    )
    words = sorted({word for question in train for word in re.findall(r"\w+", question.text)})

    def bag(question: Question) -> np.ndarray:
        present = re.findall(r"\w+", question.text)
        return np.array([present.index(word) + 1 if word in present else 0 for word in words], float)

    for kind in KINDS:
        halves = [[question for question in half if question.kind == kind] for half in (train, heldout)]
        labels = [[question.choices.index(question.answer) for question in half] for half in halves]
        guess = accuracy([bag(q) for q in halves[0]], labels[0], [bag(q) for q in halves[1]], labels[1])
        chance = 1 / len(halves[1][0].choices)
        assert abs(guess - chance) < margin(len(halves[1]), chance), kind
