"""How one object of a scene moves: where it is, how large and how visible, at any time.

Positions and sizes are in units of half the picture's short side, from its centre (x to the right, y down), so that
everything within [-1, 1] survives the centre crop of any transform. Only an object that slides leaves it at the ends of
its way.

Both motions are built so that a single picture says nothing about the answer. The obvious design fails: an object that
simply travels to the right starts on the left more often than on the right, and its first picture gives it away. No
placement mends that, for two opposite travels with equally distributed ends would need the same mean displacement. So
a `Cycle` begins anywhere in its range and starts over at the end, and a `Switch` begins in either of two states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Change = Literal["right", "left", "down", "up", "grow", "shrink", "appear", "vanish"]
Property = Literal["x", "y", "radius", "opacity"]

_CHANGES: dict[Property, tuple[Change, Change]] = {
    "x": ("right", "left"),
    "y": ("down", "up"),
    "radius": ("grow", "shrink"),
    "opacity": ("appear", "vanish"),
}
"""What a rise and a fall of each property are called."""

SWITCH_S = 0.6
"""Seconds a `Switch` takes."""


@dataclass(frozen=True, slots=True)
class State:
    """One object at one time: centre and radius in half short sides, opacity from 0 to 1."""

    x: float
    y: float
    radius: float
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Still:
    """Nothing changes."""

    def at(self, rest: State, time_s: float, span_s: float) -> State:
        """The object's state `time_s` seconds into a scene of `span_s` seconds: how it rests."""
        return rest


@dataclass(frozen=True, slots=True)
class Cycle:
    """One property rises evenly from `low` to `high`, starts over at `low`, and so on.

    With `start` uniform in [0, 1) the property is uniform in its range at *every* time, rising or (played backwards)
    falling: the object in one picture cannot tell which. Nor can the ground around it, as long as the codec leaves no
    trace of other pictures there: see `encode.py`. The radius rises by equal ratios, so its logarithm is uniform.
    `turns` stays below one half per sampled step, or rising could not be told from falling in any order.
    """

    property: Literal["x", "y", "radius"]
    low: float
    high: float
    start: float
    turns: float

    def at(self, rest: State, time_s: float, span_s: float) -> State:
        """The object's state `time_s` seconds into a scene of `span_s` seconds."""
        phase = (self.start + self.turns * time_s / span_s) % 1.0
        if self.property == "radius":
            return replace(rest, radius=self.low * (self.high / self.low) ** phase)
        value = self.low + (self.high - self.low) * phase
        return replace(rest, x=value) if self.property == "x" else replace(rest, y=value)

    def change(self, *, backwards: bool) -> Change:
        """What a viewer sees it do."""
        return _CHANGES[self.property][backwards]


@dataclass(frozen=True, slots=True)
class Switch:
    """One property goes from one value to another, once, within `SWITCH_S` seconds around `at_s`.

    With both values equally likely as the first one, a picture taken before or after shows either value as often,
    whenever the switch is: one picture cannot tell which of two objects switched first. Switches are placed half-way
    between whole seconds, so that pictures sampled at whole seconds never show one under way.
    """

    property: Property
    before: float
    after: float
    at_s: float

    def at(self, rest: State, time_s: float, span_s: float) -> State:
        """The object's state `time_s` seconds into a scene of `span_s` seconds."""
        done = min(max((time_s - self.at_s) / SWITCH_S + 0.5, 0.0), 1.0)
        value = self.before + (self.after - self.before) * done * done * (3 - 2 * done)
        match self.property:
            case "x":
                return replace(rest, x=value)
            case "y":
                return replace(rest, y=value)
            case "radius":
                return replace(rest, radius=value)
            case "opacity":
                return replace(rest, opacity=value)

    def change(self, *, backwards: bool) -> Change:
        """What a viewer sees it do."""
        return _CHANGES[self.property][(self.after < self.before) != backwards]


Motion = Still | Cycle | Switch
