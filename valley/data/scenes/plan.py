"""Which scenes a set consists of: every attribute in equal shares, and none of them tied to an answer.

Attributes are dealt like cards: each has its own shuffled deck and is reshuffled when it is used up, so its values come
equally often whatever the number of clips, and independently of the other attributes. Answers that need time are not
even dealt: each is filmed with its opposite (`Scene.backwards`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

from valley.data.scenes.motion import Cycle, Motion, Property, State, Still, Switch
from valley.data.scenes.scene import CODINGS, COLOURS, PATTERNS, SHAPES, Actor, Background, Coding, Design, Scene

Split = Literal["train", "heldout"]
T = TypeVar("T")

SIZES = ((192, 144), (240, 240), (256, 192), (320, 180), (180, 320))
FRAME_RATES = (8, 8, 10, 10, 12, 12, 15, 24, 30)
SPANS_S = (4, 4, 4, 6, 6, 6, 8, 8, 10, 12, 16, 24)
MAX_COUNT = 4

_EDGE = 0.96
"""Objects stay within this distance from the centre, in half short sides; one that slides, across its way only."""
_OUTSIDE = 0.6
"""How far the centre of one that slides leaves the central square, in radii."""


def _deck(rng: np.random.Generator, values: Sequence[T]) -> Iterator[T]:
    """Endlessly: all values in a random order, then all of them in another one."""
    while True:
        for index in rng.permutation(len(values)):
            yield values[index]


class _Dealer:
    """The decks of one split."""

    def __init__(self, rng: np.random.Generator, patterns: Sequence[str], longest_s: int) -> None:
        self.rng = rng
        self.colour = _deck(rng, tuple(COLOURS))
        self.shape = _deck(rng, SHAPES)
        self.axis: Iterator[Literal["x", "y"]] = _deck(rng, ("x", "y"))
        self.count = _deck(rng, range(1, MAX_COUNT + 1))
        self.pattern = _deck(rng, patterns)
        self.size = _deck(rng, SIZES)
        self.fps = _deck(rng, FRAME_RATES)
        self.span_s = _deck(rng, [span_s for span_s in SPANS_S if span_s <= longest_s])
        self.coding: Iterator[Coding] = _deck(rng, CODINGS)
        self.acts: Iterator[tuple[str, str]] = _deck(rng, [(a, b) for a in _ACTS for b in _ACTS])
        self.starts: Iterator[tuple[int, int]] = _deck(rng, [(a, b) for a in (0, 1) for b in (0, 1)])

    def actor(self, rest: State, motion: Motion) -> Actor:
        """One object in the next colour and shape."""
        return self._cast(next(self.colour), next(self.shape), rest, motion)

    def actors(self, parts: Sequence[tuple[State, Motion]]) -> tuple[Actor, ...]:
        """Several objects, no two of one colour or one shape."""
        colours, shapes = self.rng.permutation(list(COLOURS)), self.rng.permutation(SHAPES)
        looks = zip(colours[: len(parts)], shapes[: len(parts)], parts, strict=True)
        return tuple(self._cast(str(colour), str(shape), *part) for colour, shape, part in looks)

    def _cast(self, colour: str, shape: str, rest: State, motion: Motion) -> Actor:
        red, green, blue = (min(max(c + int(self.rng.integers(-8, 9)), 0), 255) for c in COLOURS[colour])
        return Actor(colour, shape, (red, green, blue), rest, motion)

    def within(self, limit: float) -> float:
        return float(self.rng.uniform(-limit, limit))

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))


def _still(deal: _Dealer, span_s: int) -> tuple[Actor, ...]:
    """One large object at rest."""
    radius = deal.between(0.5, 0.7)
    room = _EDGE - radius
    return (deal.actor(State(deal.within(room), deal.within(room), radius), Still()),)


def _slide(deal: _Dealer, span_s: int) -> tuple[Actor, ...]:
    """One object moves along x or y, almost leaves the central square, and comes back on the other side."""
    radius = deal.between(0.3, 0.42)
    room = _EDGE - radius
    rest = State(deal.within(room), deal.within(room), radius)
    end = 1 + _OUTSIDE * radius
    motion = Cycle(next(deal.axis), -end, end, start=deal.between(0.0, 1.0), turns=deal.between(0.25, 0.4))
    return (deal.actor(rest, motion),)


def _scale(deal: _Dealer, span_s: int) -> tuple[Actor, ...]:
    """One object grows, again and again."""
    low, high = deal.between(0.14, 0.18), deal.between(0.46, 0.54)
    room = _EDGE - high
    rest = State(deal.within(room), deal.within(room), high)
    motion = Cycle("radius", low, high, start=deal.between(0.0, 1.0), turns=deal.between(0.35, 0.6))
    return (deal.actor(rest, motion),)


def _presence(deal: _Dealer, span_s: int) -> tuple[Actor, ...]:
    """One object appears, somewhere in the middle half of the clip."""
    radius = deal.between(0.2, 0.4)
    room = _EDGE - radius
    at_s = 0.5 + float(deal.rng.integers(span_s // 4, span_s - span_s // 4))
    return (deal.actor(State(deal.within(room), deal.within(room), radius), Switch("opacity", 0.0, 1.0, at_s)),)


_ACTS = ("move", "size", "presence")


def _switch(deal: _Dealer, act: str, start: int, at_s: float, across: bool) -> tuple[State, Switch]:
    """How an object of an order scene rests in its half of the picture, and what it does."""
    radius = deal.between(0.22, 0.34)
    along, side = deal.between(-0.08, 0.08), deal.between(-0.06, 0.06)
    name: Property
    match act:
        case "move":
            name, values, along = ("x" if across else "y"), (-0.5 + along, 0.5 + along), 0.0
        case "size":
            name, values = "radius", (deal.between(0.16, 0.2), deal.between(0.38, 0.42))
        case _:
            name, values = "opacity", (0.0, 1.0)
    rest = State(along, side, radius) if across else State(side, along, radius)
    return rest, Switch(name, values[start], values[1 - start], at_s)


def _order(deal: _Dealer, span_s: int) -> tuple[Actor, ...]:
    """Two objects, above or beside each other: one moves, changes its size, appears or vanishes, then the other."""
    gap = max(2, span_s // 4)  # at least one sampled picture shows the state in between
    times = [(first, second) for first in range(span_s) for second in range(first + gap, span_s)]
    across = bool(deal.rng.integers(2))
    sides = deal.rng.permutation([-0.5, 0.5])
    parts: list[tuple[State, Motion]] = []
    for act, start, at, side in zip(next(deal.acts), next(deal.starts), deal.rng.choice(times), sides, strict=True):
        rest, motion = _switch(deal, act, start, float(at) + 0.5, across)
        rest = replace(rest, y=rest.y + float(side)) if across else replace(rest, x=rest.x + float(side))
        parts.append((rest, motion))
    return deal.actors(parts)


def _count(deal: _Dealer, span_s: int) -> tuple[Actor, ...]:
    """One to four objects at rest, all different."""
    places = deal.rng.permutation([(x, y) for x in (-0.64, 0, 0.64) for y in (-0.64, 0, 0.64)])
    return deal.actors(
        [
            (State(float(x) + deal.within(0.06), float(y) + deal.within(0.06), deal.between(0.18, 0.24)), Still())
            for x, y in places[: next(deal.count)]
        ]
    )


@dataclass(frozen=True)
class _Plot:
    """One design of scenes."""

    share: float
    """Share of the clips of a set of all kinds."""
    stage: Callable[[_Dealer, int], tuple[Actor, ...]]
    timed: tuple[str, ...]
    """Kinds of question it carries that need time: asked of a clip and of its twin."""
    timeless: tuple[str, ...]
    """Kinds it carries for which one picture is enough."""
    twins: bool = True
    hides: bool = False
    """Whether the object is (almost) out of sight for a while: then no one picture is sure to answer the timeless
    kinds, and held-out clips are not asked them."""


_PLOTS: dict[
    Design, _Plot
] = {  # those whose held-out clips share kinds follow each other: so are the decks dealt evenly
    "still": _Plot(0.18, _still, timed=(), timeless=("colour", "shape"), twins=False),
    "scale": _Plot(0.14, _scale, timed=("size",), timeless=("colour", "shape")),
    "slide": _Plot(0.26, _slide, timed=("direction",), timeless=("colour", "shape"), hides=True),
    "presence": _Plot(0.08, _presence, timed=(), timeless=("colour", "shape"), hides=True),
    "order": _Plot(0.20, _order, timed=("order",), timeless=()),
    "count": _Plot(0.14, _count, timed=(), timeless=("count",), twins=False),
}
DESIGNS: tuple[Design, ...] = tuple(_PLOTS)
"""Every design of scenes."""


def plan_scenes(
    split: Split,
    num_clips: int,
    *,
    seed: int,
    kinds: Sequence[str],
    designs: Sequence[str] = DESIGNS,
    patterns: Sequence[str] = PATTERNS,
    longest_s: int = max(SPANS_S),
) -> list[Scene]:
    """The scenes of one split, in random order.

    Args:
        split: named in the ids; each split has its own random numbers.
        num_clips: how many; when odd, one twin may be missing.
        seed: same seed, same scenes.
        kinds: kinds of question to ask; designs that carry none of them are left out.
        designs: designs to use, at least one that carries a wanted kind.
        patterns: of the grounds.
        longest_s: seconds that no clip exceeds (by more than its last picture), at least 4.

    Returns:
        `num_clips` scenes. Training clips are asked every kind they carry. Held-out twins, which show the same
        pictures, share the kinds that need no time, so that no picture is asked the same thing twice.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    deal = _Dealer(rng, patterns, longest_s)
    scenes: list[Scene] = []
    for design, num_design in _shares(num_clips, carriers(kinds, designs)).items():
        plot = _PLOTS[design]
        timed = [kind for kind in plot.timed if kind in kinds]
        timeless = [kind for kind in plot.timeless if kind in kinds]
        made: list[Scene] = []
        while len(made) < num_design:
            scene = _stage(deal, split, f"{split}-{design}-{len(made) // (1 + plot.twins)}", design)
            if not plot.twins:
                made.append(replace(scene, kinds=tuple(timed + timeless)))
                continue
            rng.shuffle(timeless)
            halves = (timeless, timeless)
            if split == "heldout":
                halves = ([], []) if plot.hides else (timeless[::2], timeless[1::2])
            made += [
                replace(scene, backwards=backwards, kinds=tuple(timed + half))
                for backwards, half in zip((False, True), halves, strict=True)
            ]
        scenes += made[:num_design]
    order = rng.permutation(len(scenes))
    return [replace(scenes[old], id=f"{split}-{new:05d}") for new, old in enumerate(order)]


def carriers(kinds: Sequence[str], designs: Sequence[str]) -> list[Design]:
    """Returns which of the designs carry a question of these kinds."""
    return [name for name, plot in _PLOTS.items() if name in designs and set(kinds) & {*plot.timed, *plot.timeless}]


def _shares(num_clips: int, designs: Sequence[Design]) -> dict[Design, int]:
    """How many clips of each design: even numbers, but for the last design, which may have an odd one."""
    ends = np.cumsum([_PLOTS[name].share for name in designs])
    ends = 2 * np.rint(ends / ends[-1] * num_clips / 2).astype(int)
    ends[-1] = num_clips
    return dict(zip(designs, np.diff(ends, prepend=0).tolist(), strict=True))


def _stage(deal: _Dealer, split: Split, pair: str, design: Design) -> Scene:
    """One scene, played forwards, not asked anything yet."""
    span_s = next(deal.span_s)
    width, height = next(deal.size)
    return Scene(
        id="",
        pair=pair,
        design=design,
        actors=_PLOTS[design].stage(deal, span_s),
        backwards=False,
        background=Background(next(deal.pattern), int(deal.rng.integers(2**31))),
        width=width,
        height=height,
        fps=next(deal.fps),
        span_s=span_s,
        coding=next(deal.coding),
        words=int(deal.rng.integers(2**31)),
        kinds=(),
    )
