"""What one scene is: who is in it, what they do, and how it is filmed. Plain values; painted by `render.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from valley.data.scenes.motion import Change, Motion, State, Still, Switch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (243, 132, 24),
    "yellow": (250, 212, 46),
    "green": (36, 160, 72),
    "blue": (38, 84, 214),
    "purple": (128, 46, 168),
    "white": (248, 248, 246),
    "black": (22, 22, 26),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PATTERNS = ("smooth", "striped", "chequered", "dotted", "grainy", "cloudy")

Design = Literal["still", "slide", "scale", "presence", "order", "count"]


@dataclass(frozen=True, slots=True)
class Actor:
    """One object."""

    colour: str
    shape: str
    rgb: tuple[int, int, int]
    rest: State
    motion: Motion

    @property
    def name(self) -> str:
        """What to call it: "red circle"."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Background:
    """The empty stage."""

    pattern: str
    seed: int


@dataclass(frozen=True, slots=True)
class Coding:
    """How x264 is asked to code it: preset, and longest distance between key frames."""

    preset: str
    gop: int


CODINGS = (
    Coding("ultrafast", gop=12),
    Coding("ultrafast", gop=48),
    Coding("superfast", gop=250),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip.

    A scene with an answer that needs time is staged once and filmed twice: the clip and its twin show the very same
    pictures, the twin in reverse order (`backwards`), and give opposite answers. The last picture is shown at exactly
    `span_s`, a multiple of 2 s, so that frames sampled at 0.5, 1 or 2 a second are the same pictures in both.
    """

    id: str
    pair: str
    """The same for a clip and its twin."""
    design: Design
    actors: tuple[Actor, ...]
    backwards: bool
    background: Background
    width: int
    height: int
    fps: int
    span_s: int
    """Time of the last picture."""
    coding: Coding
    words: int
    """Chooses among wordings; the same for a clip and its twin, so that no wording goes with an answer."""
    kinds: tuple[str, ...]
    """Kinds of question asked about this clip."""

    @property
    def num_frames(self) -> int:
        """Pictures in the clip."""
        return self.span_s * self.fps + 1

    @property
    def duration_s(self) -> float:
        """Length of the clip, the last picture's own time included."""
        return self.num_frames / self.fps

    def stage_time(self, index: int) -> float:
        """The time on stage, in seconds, of the frame shown as number `index`."""
        return (self.num_frames - 1 - index if self.backwards else index) / self.fps

    def states(self, time_s: float) -> tuple[State, ...]:
        """Where everyone is at a time on stage."""
        return tuple(actor.motion.at(actor.rest, time_s, float(self.span_s)) for actor in self.actors)

    def changes(self) -> list[tuple[Actor, Change]]:
        """What a viewer sees happen, in order."""
        moving = [(actor, actor.motion) for actor in self.actors if not isinstance(actor.motion, Still)]
        moving.sort(key=lambda pair: pair[1].at_s if isinstance(pair[1], Switch) else 0.0, reverse=self.backwards)
        return [(actor, motion.change(backwards=self.backwards)) for actor, motion in moving]
