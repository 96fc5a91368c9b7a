"""What is said about a scene: captions, and questions with answers, in the paper's dialogue format (appendix B)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from valley.data.scenes.motion import Change
from valley.data.scenes.plan import MAX_COUNT
from valley.data.scenes.scene import COLOURS, SHAPES, Actor, Scene
from valley.data.writing import conversations

_NUMBERS = ("zero", "one", "two", "three", "four")

_DESCRIBE = (
    "Describe the video concisely.",
    "Describe the following video concisely.",
    "Write a short caption for this video.",
    "What does this clip show? Answer in one sentence.",
    "Sum up the clip in a single sentence.",
)

_VERBS: dict[Change, str] = {
    "left": "moves left",
    "right": "moves right",
    "up": "moves up",
    "down": "moves down",
    "grow": "grows",
    "shrink": "shrinks",
    "appear": "appears",
    "vanish": "vanishes",
}
_REPEATED: dict[Change, str] = {
    "left": "keeps moving left",
    "right": "keeps moving right",
    "up": "keeps moving up",
    "down": "keeps moving down",
    "grow": "keeps growing",
    "shrink": "keeps shrinking",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one clip."""

    kind: str
    text: str
    answer: str
    """The words that count: "red", "left", "blue star"."""
    reply: str
    """The answer as a sentence, the target of training."""
    choices: tuple[str, ...]
    """All answers this question can have; 1 / their number is chance."""


@dataclass(frozen=True)
class Kind:
    """A kind of question."""

    single_frame: bool
    """Whether any one picture of the clip suffices to answer it; if not, none of them helps at all."""
    wordings: tuple[str, ...]
    reply: str
    answer: Callable[[Scene], str]
    choices: Callable[[Scene], tuple[str, ...]]


def _change(scene: Scene) -> Change:
    return scene.changes()[0][1]


def _mentioned(scene: Scene) -> tuple[str, ...]:
    """The names of two actors, in an order that does not depend on what they do."""
    names = tuple(actor.name for actor in scene.actors)
    return names if _draw(scene, "mention").integers(2) else names[::-1]


KINDS: dict[str, Kind] = {
    "colour": Kind(
        single_frame=True,
        wordings=("What colour is the object?", "Which colour does the object have?", "Name the colour of the object."),
        reply="It is {}.",
        answer=lambda scene: scene.actors[0].colour,
        choices=lambda scene: tuple(COLOURS),
    ),
    "shape": Kind(
        single_frame=True,
        wordings=("What shape is the object?", "Which shape does the object have?", "Name the shape of the object."),
        reply="It is a {}.",
        answer=lambda scene: scene.actors[0].shape,
        choices=lambda scene: SHAPES,
    ),
    "count": Kind(
        single_frame=True,
        wordings=("How many objects are there?", "How many objects does the video show?", "Count the objects."),
        reply="There are {}.",
        answer=lambda scene: _NUMBERS[len(scene.actors)],
        choices=lambda scene: _NUMBERS[1 : MAX_COUNT + 1],
    ),
    "direction": Kind(
        single_frame=False,
        wordings=("Which way does the object move?", "In which direction does the object move?"),
        reply="It moves {}.",
        answer=_change,
        choices=lambda scene: ("left", "right", "up", "down"),
    ),
    "size": Kind(
        single_frame=False,
        wordings=("How does the size of the object change?", "Does the object grow or shrink?"),
        reply="It keeps {}.",
        answer=lambda scene: {"grow": "growing", "shrink": "shrinking"}[_change(scene)],
        choices=lambda scene: ("growing", "shrinking"),
    ),
    "order": Kind(
        single_frame=False,
        wordings=(
            "Which changes first, the {} or the {}?",
            "Which of the two does something first, the {} or the {}?",
        ),
        reply="The {} is first.",
        answer=lambda scene: scene.changes()[0][0].name,
        choices=_mentioned,
    ),
}
"""Every kind of question, by name. Each says whether one frame suffices; chance is one over the number of choices."""


def _draw(scene: Scene, purpose: str) -> np.random.Generator:
    """Random numbers for one choice of words; the same for both twins."""
    return np.random.default_rng([scene.words, *purpose.encode()])


def _pick(scene: Scene, purpose: str, texts: tuple[str, ...]) -> str:
    return texts[_draw(scene, purpose).integers(len(texts))]


def ask(scene: Scene) -> list[Question]:
    """The questions asked about a scene, in random order, with their answers."""
    questions = []
    for name in _draw(scene, "turns").permutation(sorted(scene.kinds)).tolist():
        kind = KINDS[name]
        choices, answer = kind.choices(scene), kind.answer(scene)
        text = _pick(scene, name, kind.wordings).format(*choices)
        reply = kind.reply.format(answer).replace("There are one", "There is one")
        questions.append(Question(name, text, answer, reply, choices))
    return questions


def caption(scene: Scene) -> str:
    """One true sentence about a scene."""
    where = f"on a {scene.background.pattern} background"
    changes = scene.changes()
    match scene.design:
        case "count" | "still":
            return f"{_listed(scene.actors)} {where}."
        case "order":
            (first, change), (second, then) = changes
            return f"First {_a(first)} {_VERBS[change]}, then {_a(second)} {_VERBS[then]}, {where}."
        case "presence":
            actor, change = changes[0]
            return _capital(f"{_a(actor)} {_VERBS[change]} {where}.")
        case _:
            actor, change = changes[0]
            return _capital(f"{_a(actor)} {_REPEATED[change]} {where}.")


def _a(actor: Actor) -> str:
    return f"{'an' if actor.name[0] in 'aeiou' else 'a'} {actor.name}"


def _listed(actors: tuple[Actor, ...]) -> str:
    names = [_a(actor) for actor in actors]
    if len(names) == 1:
        return _capital(names[0])
    return f"{_NUMBERS[len(names)].capitalize()} objects: {', '.join(names[:-1])} and {names[-1]},"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def caption_records(scene: Scene, video: str) -> list[dict[str, Any]]:
    """The pre-training record of a scene, in the form of Valley-702k (appendix B.1)."""
    instruction = _prompt(scene, _pick(scene, "describe", _DESCRIBE))
    return [{"id": scene.id, "video": video, "conversations": conversations([(instruction, caption(scene))])}]


def dialogue_records(scene: Scene, video: str) -> list[dict[str, Any]]:
    """All questions about a scene as one dialogue, in the form of Valley-instruct-73k (appendix B.2)."""
    questions = ask(scene)
    if not questions:
        return []
    texts = [_prompt(scene, questions[0].text), *(question.text for question in questions[1:])]
    turns = zip(texts, (question.reply for question in questions), strict=True)
    return [{"id": scene.id, "video": video, "conversations": conversations(turns)}]


def question_records(scene: Scene, video: str) -> list[dict[str, Any]]:
    """One record per question, with what an evaluation needs beside it (parsers of the format ignore it).

    `pair` names the clip and its twin together: their items are not independent, and a statistic should know.
    """
    return [
        {
            "id": f"{scene.id}-{question.kind}",
            "video": video,
            "conversations": conversations([(_prompt(scene, question.text), question.reply)]),
            "kind": question.kind,
            "answer": question.answer,
            "choices": list(question.choices),
            "single_frame": KINDS[question.kind].single_frame,
            "pair": scene.pair,
            "duration_s": round(scene.duration_s, 3),
        }
        for question in ask(scene)
    ]


def _prompt(scene: Scene, text: str) -> str:
    """The text with the placeholder of the video before or after it; both occur in the paper's data."""
    return f"<video>\n{text}" if _draw(scene, "placeholder").integers(2) else f"{text}\n<video>"
