"""A written text on a plain ground or a label: how it is drawn, and what is asked about its colors."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from neo_components.data.pictures import palette
from neo_components.data.pictures.asking import Turn, one_form, yes_no
from neo_components.data.pictures.fonts import Face
from neo_components.data.pictures.ink import fitting_size, lay, scaled_to_fit, slanted, text_mask

LABELS = ("rectangle", "rounded", "ellipse", "tag")
"""Shapes of labels: with square or round corners, an ellipse, a price tag with a hole."""


@dataclass
class Sheet:
    """A drawn text.

    Args:
        image: mode RGB.
        ink: name of the text's color.
        ground: name of the color behind it.
        x: middle of the text, from 0 at the left to 1.
        y: middle of the text, from 0 at the top to 1.
    """

    image: Image.Image
    ink: str
    ground: str
    x: float = 0.5
    y: float = 0.5


def inked(rng: random.Random, face: Face, text: str, width: float, height: float) -> Image.Image:
    """The mask of a text in a box, with random spacing, slant and thickness."""
    spacing = rng.uniform(0.03, 0.25) if rng.random() < 0.25 and face.kind != "hand" else 0.0
    size = fitting_size(face, text, width, height, spacing)
    stroke = 1 if size > 28 and rng.random() < 0.15 else 0
    mask = text_mask(text, face.at(size), spacing * size, stroke, rng.choice(("left", "center", "right")))
    if rng.random() < 0.4:
        mask = slanted(mask, rng.uniform(-9, 9), rng.uniform(-0.25, 0.25) if rng.random() < 0.4 else 0)
    return scaled_to_fit(mask, int(width), int(height))


def write(rng: random.Random, face: Face, text: str) -> Sheet:
    """Draws a text in random colors, size, spacing and slant, anywhere in a picture.

    Args:
        rng: source of randomness.
        face: the font.
        text: lines joined by newlines.
    """
    lines, longest = text.count("\n") + 1, max(map(len, text.split("\n")))
    if longest <= 2:
        width, height = rng.randint(64, 144), rng.randint(64, 144)
        fill = rng.uniform(0.3, 0.95)
    else:
        width = rng.randint(*((96, 208) if longest <= 12 else (144, 224)))
        tight = rng.random() < 0.5
        height = round(width * (rng.uniform(0.25, 0.45) * lines**0.7 if tight else rng.uniform(0.7, 1.0)))
        height = min(224, max(40, height))
        fill = rng.uniform(0.6, 0.95)
    ink, ink_rgb, ground, ground_rgb = palette.pair(rng)
    image = palette.ground(rng, (width, height), ground_rgb)
    mask = inked(rng, face, text, (width - 6) * fill, (height - 6) * (fill if longest <= 2 else 1))
    x, y = rng.uniform(3, width - 3 - mask.width), rng.uniform(3, height - 3 - mask.height)
    lay(image, mask, ink_rgb, (x, y))
    return Sheet(image, ink, ground, (x + mask.width / 2) / width, (y + mask.height / 2) / height)


def write_label(rng: random.Random, face: Face, text: str, shape: str) -> Sheet:
    """Draws a text on a label of one of the shapes :data:`LABELS`; the ground's name is that of the label."""
    width, height = rng.randint(112, 208), rng.randint(80, 176)
    ink, ink_rgb, ground, ground_rgb = palette.pair(rng)
    table = palette.pale(rng) if palette.luminance(ground_rgb) < 0.5 else palette.dark(rng)
    image = palette.ground(rng, (width, height), table)
    wide, high = width * rng.uniform(0.75, 0.95), height * rng.uniform(0.55, 0.9)
    x, y = rng.uniform(2, width - 2 - wide), rng.uniform(2, height - 2 - high)
    draw = ImageDraw.Draw(image)
    box, line = (x, y, x + wide, y + high), rng.choice((0, 2, 3))
    inner = [x + 8, y + 6, x + wide - 8, y + high - 6]
    if shape == "ellipse":
        draw.ellipse(box, fill=ground_rgb, outline=ink_rgb if line else None, width=line)
        inner = [x + wide * 0.16, y + high * 0.2, x + wide * 0.84, y + high * 0.8]
    elif shape == "tag":
        tip = min(wide, high) * 0.3
        corners = [(x + tip, y), (x + wide, y), (x + wide, y + high), (x + tip, y + high), (x, y + high / 2)]
        draw.polygon(corners, fill=ground_rgb)
        draw.ellipse((x + tip * 0.6, y + high / 2 - 4, x + tip * 0.6 + 8, y + high / 2 + 4), fill=table)
        inner[0] = x + tip * 0.6 + 13
    else:
        radius = min(wide, high) * rng.uniform(0.15, 0.3) if shape == "rounded" else 0
        draw.rounded_rectangle(box, radius, fill=ground_rgb, outline=ink_rgb if line else None, width=line)
    mask = inked(rng, face, text, inner[2] - inner[0], inner[3] - inner[1])
    place = ((inner[0] + inner[2] - mask.width) / 2, (inner[1] + inner[3] - mask.height) / 2)
    lay(image, mask, ink_rgb, place)
    return Sheet(image, ink, ground)


def color_turns(rng: random.Random, sheet: Sheet, ground: str = "background", text: str = "text") -> list[Turn]:
    """One or two questions about the colors of a text and what is behind it."""
    turns = []
    if rng.random() < 0.5:
        forms = "what color is the {text}?|which color does the {text} have?|name the color of the {text}."
        turns.append((one_form(rng, forms, text=text), sheet.ink))
    else:
        forms = "what color is the {ground}?|which color is behind the {text}?|name the color of the {ground}."
        turns.append((one_form(rng, forms, text=text, ground=ground), sheet.ground))
    if rng.random() < 0.3:
        truth = rng.random() < 0.5
        # The wrong color is that of the ground half of the time: that there is such a color is then not enough.
        others = [name for name in palette.NAMES if name not in (sheet.ink, sheet.ground)]
        color = sheet.ink if truth else sheet.ground if rng.random() < 0.5 else rng.choice(others)
        turns.append((one_form(rng, "is the {text} {color}?", text=text, color=color), yes_no(truth)))
    return turns
