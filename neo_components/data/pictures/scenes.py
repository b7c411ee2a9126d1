"""Scenes of one to eight flat shapes as a source of pictures: places, relations, counts, sizes, fills and captions.

It goes beyond the scenes of ``neo data synth``: more shapes and colors, free places, fills, rotations, several alike.
The held-out split shows pairs of color and shape that training never has.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import ClassVar

from PIL import Image

from neo_components.data.pictures import palette
from neo_components.data.pictures.asking import one_form
from neo_components.data.pictures.picture import COLOR, FRAME, MIRROR, SPLITS, TRAIN, TURN, Picture, PictureSource
from neo_components.data.pictures.scene_questions import DESCRIBE, QUESTIONS, caption, count_turn
from neo_components.data.pictures.shapes import FILLS, HELD_OUT_PAIRS, PAIRS, Thing, draw_thing, random_turn
from neo_components.data.skip_counts import SampleError
from neo_components.errors import one_of
from neo_components.registry import PICTURES

MOST = 8
"""Most things in a scene."""
PATTERNED = 0.3
"""Chance that the things of a scene have several fills."""
NEW = 0.6
"""Part of the things of a held-out scene whose pair of color and shape is held out, rounded up."""
LEAST_CONTRAST = 1.45
"""Of a color against the background."""
TRIES = 400
"""Places that are tried for a thing, each a little smaller."""
OVERLAP = 0.08
"""Chance that things of a scene may overlap a little."""
GROUNDS: tuple[Callable[[random.Random], palette.RGB], ...] = (
    *(palette.pale,) * 5, *(palette.dark,) * 2, palette.middle,
)  # fmt: skip


@PICTURES.register("scenes")
class Scenes(PictureSource):
    """Drawn scenes. One in eight gets a caption; of the others a third has several things alike, to be counted."""

    license: ClassVar[str] = "CC0-1.0"
    origin: ClassVar[str] = "drawn: flat shapes in random colors and places"

    def items(self, split: str) -> None:
        """Scenes are drawn without end."""
        one_of("split", split, SPLITS)

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A scene with its questions."""
        one_of("split", split, SPLITS)
        background = rng.choice(GROUNDS)(rng)
        chance = rng.random()
        keeps = frozenset({COLOR, TURN, MIRROR, FRAME})
        if chance < 0.12:
            things = distinct(rng, split, background, rng.randint(1, 4))
            turns: tuple[tuple[str, str], ...] = ((one_form(rng, DESCRIBE), caption(things)),)
            return Picture(render(rng, things, background), turns, "caption", keeps)
        if chance < 0.4:
            things, turn = crowd(rng, split, background)
            turns = asked(rng, things, split, first=turn)
            return Picture(render(rng, things, background), turns, "count", keeps)
        things = distinct(rng, split, background, rng.choice((1, 2, 2, 3, 3, 4, 5, 6)))
        return Picture(render(rng, things, background), asked(rng, things, split), "scene", keeps)


def pairs(split: str) -> tuple[tuple[str, str], ...]:
    """The pairs of color and shape that a split may show: in training not those that are held out."""
    return PAIRS if split != TRAIN else _SHOWN


_SHOWN = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)


def visible(split: str, background: palette.RGB) -> list[tuple[str, str]]:
    """The pairs of a split whose color stands out from a background."""
    colors = {name for name, rgb in palette.COLORS.items() if palette.contrast(rgb, background) > LEAST_CONTRAST}
    return [pair for pair in pairs(split) if pair[0] in colors]


def distinct(rng: random.Random, split: str, background: palette.RGB, count: int) -> list[Thing]:
    """Things of which no two have both color and shape in common; most are held-out pairs if the split is."""
    usable = visible(split, background)
    new = [pair for pair in usable if pair in HELD_OUT_PAIRS]
    most = math.ceil(count * NEW) if new else 0
    chosen = rng.sample(new, most) + rng.sample([pair for pair in usable if pair not in new], count - most)
    rng.shuffle(chosen)
    return placed(rng, chosen, background)


def crowd(rng: random.Random, split: str, background: palette.RGB) -> tuple[list[Thing], tuple[str, str]]:
    """Things some of which are alike, and the question how many there are of something: 0 to 6 with equal chances."""
    usable = visible(split, background)
    kind = rng.choice(("color", "shape", "both"))
    target = rng.choice(usable if split == TRAIN else [pair for pair in usable if pair in HELD_OUT_PAIRS])

    def matches(pair: tuple[str, str]) -> bool:
        return pair == target if kind == "both" else pair[kind == "shape"] == target[kind == "shape"]

    wanted = rng.randint(0, 6)
    other = rng.randint(2 if wanted == 0 else 0, MOST - wanted)
    like, unlike = [pair for pair in usable if matches(pair)], [pair for pair in usable if not matches(pair)]
    few = rng.sample(unlike, 4)
    # Half of the distractors share color or shape with what is counted.
    near = [pair for pair in unlike if pair[0] == target[0] or pair[1] == target[1]]
    chosen = [rng.choice(like) for _ in range(wanted)]
    chosen += [rng.choice(near if near and rng.random() < 0.5 else few) for _ in range(other)]
    things = placed(rng, chosen, background)
    return things, count_turn(rng, kind, target, things)


def asked(
    rng: random.Random, things: Sequence[Thing], split: str, first: tuple[str, str] | None = None
) -> tuple[tuple[str, str], ...]:
    """One to four questions about a scene, each of another kind."""
    turns = [first] if first else []
    allowed = pairs(split)
    wanted = 1
    while wanted < 4 and rng.random() < 0.5:
        wanted += 1
    for question in rng.sample(QUESTIONS, len(QUESTIONS)):
        if len(turns) >= wanted:
            break
        if (turn := question(rng, things, allowed)) is not None and turn[0] not in dict(turns):
            turns.append(turn)
    rng.shuffle(turns)
    return tuple(turns)


def placed(rng: random.Random, chosen: Sequence[tuple[str, str]], background: palette.RGB) -> list[Thing]:
    """Things at free places, large and small ones; small enough that nearly always all find room.

    Raises:
        SampleError: (a ``ValueError``) if one does not.
    """
    fills = FILLS if rng.random() < PATTERNED else ("filled",)
    most = {1: 0.42, 2: 0.26, 3: 0.22, 4: 0.19}.get(len(chosen), 0.15)
    gap = 0.75 if rng.random() < OVERLAP else 1.08
    things: list[Thing] = []
    for color, shape in chosen:
        for attempt in range(TRIES):
            half = rng.uniform(0.065, most) * 0.985 ** (attempt / 4)
            half = max(0.055, half)
            x, y = (rng.uniform(half + 0.02, 0.98 - half) for _ in range(2))
            if all(math.hypot(x - one.x, y - one.y) > gap * (half + one.half) for one in things):
                break
        else:
            raise SampleError(f"{len(chosen)} things find no room in a scene", "too_large")
        degrees, direction = random_turn(rng, shape)
        rgb = palette.shade(rng, color)
        fill = rng.choice(fills)
        if shape == "circle" and fill == "outlined":  # that is a thin ring
            fill = "filled"
        things.append(Thing(color, shape, fill, x, y, half, rgb, degrees, direction))
    return things


def render(rng: random.Random, things: Sequence[Thing], background: palette.RGB) -> Image.Image:
    """The picture, square, drawn at twice its size and halved."""
    # Patterns are not seen in small pictures.
    plain = all(thing.fill == "filled" for thing in things)
    side = rng.choice((80, 96, 112, 128, 160, 192) if plain else (128, 144, 160, 192))
    image = Image.new("RGB", (2 * side, 2 * side), background)
    for thing in things:
        draw_thing(image, thing, background)
    return image.reduce(2)
