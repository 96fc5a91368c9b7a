"""Pictures of a scene: antialiased shapes with a little light and shadow on a quiet, varied background."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from valley.data.scenes.motion import State
from valley.data.scenes.scene import Actor, Background, Scene

Field = NDArray[np.float32]
"""A value for every pixel of a part of the picture, [h, w]."""

Image = UInt8[np.ndarray, "H W 3"]

_SHADOW = 0.3
"""Depth of the soft shadow around a shape, as a share of black."""


# Shapes: the signed distance to the outline of a shape of radius 1 (negative inside), from which coverage, rim and
# shadow all follow.


def _circle(x: Field, y: Field) -> Field:
    return (x**2 + y**2) ** 0.5 - 1


def _ring(x: Field, y: Field) -> Field:
    return abs((x**2 + y**2) ** 0.5 - 0.74) - 0.26


def _box(x: Field, y: Field, half_width: float, half_height: float) -> Field:
    beyond_x, beyond_y = abs(x) - half_width, abs(y) - half_height
    outside: Field = (beyond_x.clip(0) ** 2 + beyond_y.clip(0) ** 2) ** 0.5
    inside: Field = np.maximum(beyond_x, beyond_y).clip(max=0)
    return outside + inside


def _square(x: Field, y: Field) -> Field:
    return _box(x, y, 0.76, 0.76) - 0.06


def _cross(x: Field, y: Field) -> Field:
    either: Field = np.minimum(_box(x, y, 0.95, 0.27), _box(x, y, 0.27, 0.95))
    return either - 0.05


def _polygon(x: Field, y: Field, corners: list[tuple[float, float]]) -> Field:
    nearest = np.full_like(x, np.inf)
    inside = np.zeros(x.shape, bool)
    for (from_x, from_y), (to_x, to_y) in zip(corners, corners[1:] + corners[:1], strict=True):
        edge_x, edge_y = to_x - from_x, to_y - from_y
        dx, dy = x - from_x, y - from_y
        along = ((dx * edge_x + dy * edge_y) / (edge_x**2 + edge_y**2)).clip(0, 1)
        np.minimum(nearest, (dx - along * edge_x) ** 2 + (dy - along * edge_y) ** 2, out=nearest)
        if edge_y:  # a point is inside if a ray to its left crosses an odd number of edges
            inside ^= ((dy < 0) != (dy < edge_y)) & (dx > dy * (edge_x / edge_y))
    return nearest**0.5 * np.where(inside, np.float32(-1), np.float32(1))


def _corners(*radii: float) -> list[tuple[float, float]]:
    """Points at these distances from the centre, at equal angles, clockwise from the top."""
    angles = [2 * math.pi * step / len(radii) for step in range(len(radii))]
    return [(radius * math.sin(angle), -radius * math.cos(angle)) for radius, angle in zip(radii, angles, strict=True)]


_TRIANGLE = [(x, y + 0.15) for x, y in _corners(1.0, 1.0, 1.0)]
_STAR = _corners(*[1.0, 0.46] * 5)

_OUTLINES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE) - 0.05,
    "star": lambda x, y: _polygon(x, y, _STAR) - 0.03,
    "cross": _cross,
    "ring": _ring,
}


# Backgrounds: how much of a second tone is mixed into the first at each place, from 0 to 1. Coordinates are those of
# motion.py; `pixel` is the size of one pixel in them.


def _turned(rng: np.random.Generator, x: Field, y: Field) -> Field:
    angle = rng.uniform(0, 2 * math.pi)
    return x * math.cos(angle) + y * math.sin(angle)


def _bands(position: Field, width: float, pixel: float) -> Field:
    """Alternate bands of 0 and 1 with antialiased edges."""
    to_edge = width / 2 - abs(position % (2 * width) - width)
    return (to_edge / pixel + 0.5).clip(0, 1)


def _gradient(rng: np.random.Generator, x: Field, y: Field, pixel: float) -> Field:
    return (0.5 + 0.45 * _turned(rng, x, y)).clip(0, 1)


def _stripes(rng: np.random.Generator, x: Field, y: Field, pixel: float) -> Field:
    return _bands(_turned(rng, x, y), rng.uniform(0.12, 0.3), pixel)


def _checks(rng: np.random.Generator, x: Field, y: Field, pixel: float) -> Field:
    width = rng.uniform(0.15, 0.3)
    across = _bands(x + rng.uniform(0, 1), width, pixel)
    down = _bands(y + rng.uniform(0, 1), width, pixel)
    return across + down - 2 * across * down


def _dots(rng: np.random.Generator, x: Field, y: Field, pixel: float) -> Field:
    pitch = rng.uniform(0.16, 0.28)
    dx = (x + rng.uniform(0, 1)) % pitch - pitch / 2
    dy = (y + rng.uniform(0, 1)) % pitch - pitch / 2
    return ((0.28 * pitch - (dx**2 + dy**2) ** 0.5) / pixel + 0.5).clip(0, 1)


def _grain(rng: np.random.Generator, x: Field, y: Field, pixel: float) -> Field:
    return (0.5 + 0.25 * rng.standard_normal(x.shape, np.float32)).clip(0, 1)


def _clouds(rng: np.random.Generator, x: Field, y: Field, pixel: float) -> Field:
    total = np.zeros_like(x)
    for octave in range(4):
        total += _smooth_noise(rng, x, y, cells=2 * 2**octave) / 2**octave
    return (0.5 + 0.55 * (total - float(total.mean()))).clip(0, 1)


def _smooth_noise(rng: np.random.Generator, x: Field, y: Field, cells: int) -> Field:
    """Random values on a lattice, smoothly joined, from -1 to 1."""
    lattice: Field = 2 * rng.random((4 * cells + 2, 4 * cells + 2), np.float32) - 1
    u, v = (x + 2) * (cells / 2), (y + 2) * (cells / 2)
    column, row = u.astype(int), v.astype(int)
    u, v = u % 1, v % 1
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    top = lattice[row, column] * (1 - u) + lattice[row, column + 1] * u
    bottom = lattice[row + 1, column] * (1 - u) + lattice[row + 1, column + 1] * u
    joined: Field = top * (1 - v) + bottom * v
    return joined


_PATTERNS: dict[str, Callable[[np.random.Generator, Field, Field, float], Field]] = {
    "smooth": _gradient,
    "striped": _stripes,
    "chequered": _checks,
    "dotted": _dots,
    "grainy": _grain,
    "cloudy": _clouds,
}


def paint_background(background: Background, width: int, height: int) -> Image:
    """The empty stage: two muted tones of middle brightness in a pattern, so that every object colour stands out."""
    rng = np.random.default_rng(background.seed)
    half = min(width, height) / 2
    x, y = np.meshgrid(_centres(0, width, width / 2, half), _centres(0, height, height / 2, half))
    hue, saturation, value = rng.uniform(0, 1), rng.uniform(0.08, 0.28), rng.uniform(0.5, 0.62)
    contrast = rng.uniform(0.08, 0.16) * rng.choice([-1, 1])
    first = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
    second = np.array(colorsys.hsv_to_rgb((hue + rng.uniform(-0.1, 0.1)) % 1, saturation, value + contrast))
    mix = _PATTERNS[background.pattern](rng, x, y, 1 / half)[..., None]
    return (255 * (first * (1 - mix) + second * mix)).round().astype(np.uint8)


def _centres(first: int, end: int, origin: float, unit: float) -> NDArray[np.float32]:
    """Where the centres of a run of pixels lie, counted from `origin` in steps of `unit` pixels."""
    return (np.arange(first, end, dtype=np.float32) + np.float32(0.5 - origin)) / np.float32(unit)


class Painter:
    """Paints the pictures of one scene, again and again onto one canvas."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._background = paint_background(scene.background, scene.width, scene.height)
        self._canvas = self._background.copy()
        self._boxes: list[tuple[slice, slice]] = []
        self._states: tuple[State, ...] | None = None

    def paint(self, time_s: float) -> Image:
        """The picture at a time of the scene as it was played (not reversed). The next call overwrites it."""
        self.repaint(time_s)
        return self._canvas

    def repaint(self, time_s: float) -> bool:
        """Bring the canvas up to a time; returns whether that changed anything."""
        states = tuple(map(self._snapped, self._scene.states(time_s)))
        if states == self._states:
            return False
        for box in self._boxes:
            self._canvas[box] = self._background[box]
        self._boxes = [self._draw(actor, state) for actor, state in zip(self._scene.actors, states, strict=True)]
        self._states = states
        return True

    def _snapped(self, state: State) -> State:
        """The state to the nearest eighth of a pixel: what moves slower than that need not be painted every time."""
        grid = 8 * min(self._scene.width, self._scene.height) / 2
        x, y, radius = (round(value * grid) / grid for value in (state.x, state.y, state.radius))
        return State(x, y, radius, state.opacity)

    def _draw(self, actor: Actor, state: State) -> tuple[slice, slice]:
        """Blend one object into the canvas; returns the part of the canvas that changed."""
        width, height = self._scene.width, self._scene.height
        half = min(width, height) / 2
        centre_x, centre_y, radius = width / 2 + state.x * half, height / 2 + state.y * half, state.radius * half
        reach = 1.35 * radius + 1
        left, right = max(int(centre_x - reach), 0), min(int(centre_x + reach) + 2, width)
        top, bottom = max(int(centre_y - reach), 0), min(int(centre_y + reach) + 2, height)
        box = (slice(top, bottom), slice(left, right))
        if state.opacity == 0:
            return box
        x, y = np.meshgrid(_centres(left, right, centre_x, radius), _centres(top, bottom, centre_y, radius))
        distance = _OUTLINES[actor.shape](x, y)
        cover = (0.5 - distance * radius).clip(0, 1) * state.opacity
        shadow = _SHADOW * (1 - distance / 0.32).clip(0, 1) ** 2 * state.opacity
        light = 1.04 - 0.1 * y - 0.16 * (1 + distance / 0.1).clip(0, 1)  # brighter at the top, darker at the rim
        body = (light[..., None] * np.array(actor.rgb, np.float32)).clip(0, 255)
        under = self._canvas[box] * (1 - shadow)[..., None]
        self._canvas[box] = (under + (body - under) * cover[..., None]).round().astype(np.uint8)
        return box


def pictures(scene: Scene) -> Iterator[Image | None]:
    """The scene's frames in order of presentation, with None for one that is like the one before.

    Each is overwritten by the next: copy what is to be kept.
    """
    painter = Painter(scene)
    for index in range(scene.num_frames):
        time_s = scene.stage_time(index)
        yield painter.paint(time_s) if painter.repaint(time_s) else None
