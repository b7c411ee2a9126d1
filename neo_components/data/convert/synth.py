"""Synthetic scenes that test where things are: colored shapes, captions, and questions whose answers are computed.

A scene is drawn on a grid of three by three cells, at most one shape in a cell, no two alike in color and shape. Four
kinds of questions: ``place`` (in which cell), ``relation`` (left, right, above or below of another, yes or no),
``nearest`` (color of the shape next to one), ``count`` (how many of a color or shape). For each question the answer is
drawn first, evenly, and the scene is drawn until it gives that answer, so a model that ignores the image is at chance.

Background, shades and sizes vary from scene to scene: a model trained on one background and six exact colors
generalizes little to other images.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from neo_components.data.convert.base import Converter
from neo_components.data.shards.format import RawSample
from neo_components.errors import ArgumentError, one_of
from neo_components.registry import CONVERTERS

COLORS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50),
    "black": (20, 20, 20), "orange": (240, 140, 30),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
SIZES = {"small": (0.2, 0.27), "large": (0.36, 0.45)}
"""Least and largest half of the side of a shape, in cells."""
SHADE = 20
"""By how much a channel of a shape's color, of 0 to 255, is above or below that of :data:`COLORS`."""
PALE = (222, 255)
"""Least and largest channel of a background."""
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
RELATIONS: dict[str, Callable[[Thing, Thing], bool]] = {
    "left of": lambda one, other: one.x < other.x,
    "right of": lambda one, other: one.x > other.x,
    "above": lambda one, other: one.y < other.y,
    "below": lambda one, other: one.y > other.y,
}
KINDS = ("place", "relation", "nearest", "count")
MOST = 4
"""Largest answer to a question of how many of a shape."""


@dataclass(frozen=True)
class Thing:
    """A shape in a scene; x and y are its middle in cells, to the right and down, half is half its side."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    half: float
    rgb: tuple[int, ...]

    @property
    def name(self) -> str:
        """What questions call it."""
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """Its cell, ``top left`` to ``bottom right``."""
        return f"{ROWS[int(self.y)]} {COLUMNS[int(self.x)]}"


def draw_scene(rng: random.Random, least: int = 2, most: int = 5) -> list[Thing]:
    """Random things in different cells, no two of the same color and shape."""
    number = rng.randint(least, most)
    cells = rng.sample([(x, y) for x in range(3) for y in range(3)], number)
    styles = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], number)
    things = []
    for (x, y), (color, shape) in zip(cells, styles, strict=True):
        size = rng.choice(tuple(SIZES))
        half = rng.uniform(*SIZES[size])
        room = 0.5 - half
        shift = (rng.uniform(-room, room), rng.uniform(-room, room))
        shade = tuple(min(255, max(0, channel + rng.randint(-SHADE, SHADE))) for channel in COLORS[color])
        things.append(Thing(color, shape, size, x + 0.5 + shift[0], y + 0.5 + shift[1], half, shade))
    return things


def draw_image(things: Sequence[Thing], background: tuple[int, ...] = (245, 245, 245), side: int = 96) -> bytes:
    """The scene as a PNG file of ``side`` x ``side`` pixels."""
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    cell = side / 3
    for thing in things:
        half, x, y = thing.half * cell, thing.x * cell, thing.y * cell
        box = (x - half, y - half, x + half, y + half)
        if thing.shape == "circle":
            draw.ellipse(box, fill=thing.rgb)
        elif thing.shape == "square":
            draw.rectangle(box, fill=thing.rgb)
        else:
            draw.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=thing.rgb)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def caption(things: Sequence[Thing]) -> str:
    """All things of a scene with size and cell, from top left to bottom right."""
    ordered = sorted(things, key=lambda thing: (int(thing.y), int(thing.x)))
    return ", ".join(f"a {thing.size} {thing.name} at the {thing.place}" for thing in ordered)


def nearest(thing: Thing, things: Sequence[Thing]) -> Thing | None:
    """The thing whose middle is nearest to another's; ``None`` if two are about as near (within a tenth)."""
    others = sorted((math.hypot(o.x - thing.x, o.y - thing.y), n) for n, o in enumerate(things) if o is not thing)
    if len(others) > 1 and others[1][0] < 1.1 * others[0][0]:
        return None
    return things[others[0][1]] if others else None


def _place(rng: random.Random) -> tuple[list[Thing], str, str]:
    wanted = f"{rng.choice(ROWS)} {rng.choice(COLUMNS)}"
    while True:
        things = draw_scene(rng)
        for thing in things:
            if thing.place == wanted:
                return things, f"where is the {thing.name}?", wanted


def _relation(rng: random.Random) -> tuple[list[Thing], str, str]:
    wanted, relation = rng.choice(("yes", "no")), rng.choice(tuple(RELATIONS))
    while True:
        things = draw_scene(rng)
        one, other = rng.sample(things, 2)
        clear = abs(one.x - other.x if "of" in relation else one.y - other.y) > 0.3
        if clear and RELATIONS[relation](one, other) == (wanted == "yes"):
            return things, f"is the {one.name} {relation} the {other.name}?", wanted


def _nearest(rng: random.Random) -> tuple[list[Thing], str, str]:
    wanted = rng.choice(tuple(COLORS))
    while True:
        things = draw_scene(rng, least=3)
        thing = rng.choice(things)
        found = nearest(thing, things)
        # The color that the question itself names is never the answer, so it reveals nothing but that.
        if found is not None and found.color == wanted and wanted != thing.color:
            return things, f"what color is the shape nearest to the {thing.name}?", wanted


def _count(rng: random.Random) -> tuple[list[Thing], str, str]:
    what = rng.choice((*SHAPES, *COLORS))
    # A color comes in three shapes, and no thing is there twice.
    wanted = rng.randint(0, len(SHAPES) if what in COLORS else MOST)
    while True:
        things = draw_scene(rng, least=max(wanted, 2), most=6)
        if sum(what in (thing.color, thing.shape) for thing in things) == wanted:
            noun = f"{what} shapes" if what in COLORS else f"{what}s"
            return things, f"how many {noun} are there?", str(wanted)


_ASK = {"place": _place, "relation": _relation, "nearest": _nearest, "count": _count}


@CONVERTERS.register("synth")
@dataclass
class Scenes(Converter):
    """Draw scenes of small shapes, with questions on place, relation, nearest and count, as shards.

    Args:
        count: Number of samples; the kinds take turns.
        seed: The same seed gives the same samples.
        kind: Kind of questions: place, relation, nearest or count; repeat it for several; by default all.
        captions: Descriptions instead of questions.

    Raises:
        ValueError: if a number or kind is not possible.
    """

    count: int = 10_000
    seed: int = 0
    kind: list[str] | None = None
    captions: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.count, self._kinds)

    @property
    def _kinds(self) -> Sequence[str]:
        return KINDS if self.kind is None else self.kind

    def records(self) -> Iterator[RawSample]:
        """The samples: one stream of random numbers draws them in order."""
        return scenes(self.count, self.seed, self._kinds, self.captions)

    def sample(self, record: RawSample) -> RawSample:
        """The record itself."""
        return record

    def total(self) -> int:
        """Number of the samples."""
        return self.count


def scenes(count: int, seed: int = 0, kinds: Sequence[str] = KINDS, captions: bool = False) -> Iterator[RawSample]:
    """Yields samples for ``write_shards``: an image with one question, or with its caption.

    Args:
        count: number of samples; the kinds take turns.
        seed: same seed, same samples. Different seeds give different scenes.
        kinds: of questions.
        captions: ask for a description instead.

    Raises:
        ValueError: if a number or kind is not possible.
    """
    _check(count, kinds)
    rng = random.Random(f"scenes {seed}")
    for number in range(count):
        kind = "caption" if captions else kinds[number % len(kinds)]
        if captions:
            things = draw_scene(rng)
            question, answer = "describe the picture.", caption(things)
        else:
            things, question, answer = _ASK[kind](rng)
        image = draw_image(things, tuple(rng.randint(*PALE) for _ in range(3)))
        yield _sample(f"{seed}-{number:06d}", kind, things, image, question, answer)


def _sample(key: str, kind: str, things: Sequence[Thing], image: bytes, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    scene = [{"name": t.name, "size": t.size, "x": round(t.x, 3), "y": round(t.y, 3)} for t in things]
    return {"key": key, "conversations": turns, "images": [image], "kind": kind, "scene": scene}


def _check(count: int, kinds: Sequence[str]) -> None:
    if count < 1:
        raise ArgumentError("count", f"must be 1 or more, got {count}")
    for kind in kinds:
        one_of("kind", kind, KINDS)
    if not kinds:
        raise ArgumentError("kind", f"must name at least one of {', '.join(KINDS)}")
