"""Twelve flat shapes with fills and patterns, turned, for drawn scenes; which pairs of color and shape are held out."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from neo_components.data.pictures.palette import NAMES, RGB

SHAPES = (
    "circle", "square", "triangle", "rectangle", "star", "cross", "pentagon", "hexagon", "ring", "heart", "half circle",
    "arrow",
)  # fmt: skip
_IN_EASY_VQA = ("circle", "rectangle", "triangle")
PAIRS = tuple((color, shape) for color in NAMES for shape in SHAPES)
HELD_OUT_PAIRS = frozenset(
    (color, shape)
    for row, color in enumerate(NAMES)
    for column, shape in enumerate(shape for shape in SHAPES if shape not in _IN_EASY_VQA)
    if (row + 2 * column) % 4 == 1
)
"""About a fifth of all pairs of color and shape, which training never shows. None has a shape of easy-VQA, whose
training split shows these in many colors."""

FILLS = ("filled", "outlined", "striped", "dotted", "checked")
DIRECTIONS = {"right": 0, "up": 90, "left": 180, "down": 270}
"""Where an arrow points, with degrees counter-clockwise."""
_SYMMETRIC = ("circle", "ring")


@dataclass(frozen=True)
class Thing:
    """A shape in a scene; lengths in fractions of the picture's width and height.

    Args:
        color: name of its color.
        shape: of :data:`SHAPES`.
        fill: of :data:`FILLS`.
        x: its middle, to the right.
        y: its middle, down.
        half: half of its width.
        rgb: its shade.
        degrees: turned counter-clockwise.
        direction: where it points, if it is an arrow.
    """

    color: str
    shape: str
    fill: str
    x: float
    y: float
    half: float
    rgb: RGB
    degrees: float = 0
    direction: str = ""

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.color} {self.shape}"


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape between -1 and 1, y up; curves as many short lines."""
    if shape in ("circle", "ring"):
        return _regular(40)
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "rectangle":
        return [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)]
    if shape in ("triangle", "pentagon", "hexagon"):
        return _regular({"triangle": 3, "pentagon": 5, "hexagon": 6}[shape])
    if shape == "star":
        outer, inner = _regular(5), _regular(5, 36)
        return [
            point
            for one, other in zip(outer, inner, strict=True)
            for point in (one, (other[0] * 0.42, other[1] * 0.42))
        ]
    if shape == "cross":
        arm = 0.34
        corner = [(arm, 1), (arm, arm), (1, arm)]
        quarters = [[(x * sx, y * sy) for x, y in corner] for sx, sy in ((1, 1), (1, -1), (-1, -1), (-1, 1))]
        return quarters[0] + quarters[1][::-1] + quarters[2] + quarters[3][::-1]
    if shape == "heart":
        steps = [2 * math.pi * n / 40 for n in range(40)]
        curve = [
            (16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
            for t in steps
        ]
        return [(x / 17, (y + 2.5) / 17) for x, y in curve]
    if shape == "half circle":
        steps = [math.pi * n / 24 for n in range(25)]
        return [(math.cos(t), math.sin(t) - 0.45) for t in steps]
    return [(-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28)]


def _regular(corners: int, turned: float = 0) -> list[tuple[float, float]]:
    angles = [math.radians(90 + turned + 360 * n / corners) for n in range(corners)]
    return [(math.cos(angle), math.sin(angle)) for angle in angles]


def draw_thing(image: Image.Image, thing: Thing, background: RGB) -> None:
    """Draws a shape with its fill; ``image`` is usually twice as large as wanted, to be halved for smooth edges."""
    unit = min(image.size)
    half = thing.half * unit
    x, y = thing.x * image.width, thing.y * image.height
    angle = math.radians(thing.degrees)
    cos, sin = math.cos(angle) * half, math.sin(angle) * half
    points = [(x + px * cos - py * sin, y - px * sin - py * cos) for px, py in outline(thing.shape)]
    draw = ImageDraw.Draw(image)
    line = max(3, round(half * 0.16))
    if thing.fill == "outlined":
        draw.line([*points, points[0], points[1]], fill=thing.rgb, width=line, joint="curve")
    elif thing.fill == "filled":
        draw.polygon(points, fill=thing.rgb)
    else:
        _patterned(image, points, thing, background, half)
        draw.line([*points, points[0], points[1]], fill=thing.rgb, width=max(3, line // 2), joint="curve")
    if thing.shape == "ring":
        hole = [(x + (px - x) * 0.55, y + (py - y) * 0.55) for px, py in points]
        draw.polygon(hole, fill=background)
        if thing.fill != "filled":
            draw.line([*hole, hole[0], hole[1]], fill=thing.rgb, width=max(3, line // 2), joint="curve")


def _patterned(
    image: Image.Image, points: list[tuple[float, float]], thing: Thing, background: RGB, half: float
) -> None:
    """Fills a polygon with stripes, dots or checks of the shape's color on the background."""
    left, top = (int(min(point[n] for point in points)) for n in (0, 1))
    wide, high = (int(max(point[n] for point in points)) - low + 2 for n, low in ((0, left), (1, top)))
    inside, pattern = Image.new("L", (wide, high)), Image.new("L", (wide, high))
    ImageDraw.Draw(inside).polygon([(px - left, py - top) for px, py in points], fill=255)
    draw, step = ImageDraw.Draw(pattern), max(8, round(half * 0.42))
    if thing.fill == "striped":
        for start in range(-high, wide, step):
            draw.line((start, high, start + high, 0), fill=255, width=step // 2)
    elif thing.fill == "checked":
        for row, y in enumerate(range(0, high, step)):
            for x in range(row % 2 * step, wide, 2 * step):
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=255)
    else:
        for row, y in enumerate(range(0, high, step)):
            for x in range(row % 2 * step // 2, wide, step):
                draw.ellipse((x, y, x + step * 0.62, y + step * 0.62), fill=255)
    image.paste(background, (left, top), inside)
    image.paste(thing.rgb, (left, top), ImageChops.multiply(inside, pattern))


def random_turn(rng: random.Random, shape: str) -> tuple[float, str]:
    """Degrees by which a shape is turned, and where it points if it is an arrow; no square becomes a diamond."""
    if shape == "arrow":
        direction = rng.choice(tuple(DIRECTIONS))
        return DIRECTIONS[direction] + rng.uniform(-12, 12), direction
    if shape in _SYMMETRIC or rng.random() < 0.5:
        return 0, ""
    if shape == "rectangle":
        return rng.choice((0, 90)) + rng.uniform(-20, 20), ""
    if shape in ("star", "pentagon", "hexagon", "triangle", "half circle"):
        return rng.uniform(-180, 180), ""
    return rng.uniform(-20, 20), ""
