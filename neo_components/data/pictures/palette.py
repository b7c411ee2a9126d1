"""Named colors of drawn pictures: shades that are called by one name, and pairs that stand apart."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from PIL import Image

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (215, 40, 40), "orange": (242, 135, 30), "yellow": (243, 213, 45), "green": (45, 158, 65),
    "blue": (45, 85, 215), "purple": (125, 50, 165), "pink": (245, 135, 190), "brown": (122, 72, 32),
    "black": (22, 22, 22), "white": (246, 246, 246), "gray": (132, 132, 132), "cyan": (60, 200, 215),
}  # fmt: skip
NAMES = tuple(COLORS)
SHADE = 13
"""By how much a channel of a shade, of 0 to 255, is above or below that of :data:`COLORS`."""
GRAYS = ("black", "white", "gray")


def shade(rng: random.Random, name: str) -> RGB:
    """A shade of a color that is called by its name; grays stay gray."""
    if name in GRAYS:
        shift = rng.randint(-SHADE, SHADE)
        red, green, blue = (min(255, max(0, channel + shift)) for channel in COLORS[name])
    else:
        red, green, blue = (min(255, max(0, channel + rng.randint(-SHADE, SHADE))) for channel in COLORS[name])
    return red, green, blue


def luminance(rgb: Sequence[int]) -> float:
    """Relative luminance from 0 to 1 (WCAG 2.1), with the exponent 2.2 for sRGB's curve."""
    red, green, blue = ((channel / 255) ** 2.2 for channel in rgb[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """Contrast ratio of two colors, 1 to 21 (WCAG 2.1)."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def pair(rng: random.Random, least: float = 2.5, names: Iterable[str] = NAMES) -> tuple[str, RGB, str, RGB]:
    """Two named colors with shades whose contrast is ``least`` or more: name and shade of ink, then of ground."""
    names = tuple(names)
    while True:
        ink, ground = rng.sample(names, 2)
        ink_rgb, ground_rgb = shade(rng, ink), shade(rng, ground)
        if contrast(ink_rgb, ground_rgb) >= least:
            return ink, ink_rgb, ground, ground_rgb


def apart(rng: random.Random, count: int, ground: Sequence[int], least: float = 1.35) -> list[tuple[str, RGB]]:
    """Different colors with shades that stand out from a ground.

    Raises:
        ValueError: if there are not so many.
    """
    found = [(name, shade(rng, name)) for name in rng.sample(NAMES, len(NAMES))]
    found = [(name, rgb) for name, rgb in found if contrast(rgb, ground) >= least]
    if len(found) < count:
        raise ValueError(f"only {len(found)} colors stand out from {tuple(ground)}, {count} are asked for")
    return found[:count]


def pale(rng: random.Random) -> RGB:
    """A light background without a name."""
    low = rng.choice((225, 240))
    return rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255)


def dark(rng: random.Random) -> RGB:
    """A dark background without a name."""
    return rng.randint(8, 45), rng.randint(8, 45), rng.randint(8, 45)


def middle(rng: random.Random) -> RGB:
    """A background between light and dark, of so little color that it has no name."""
    level = rng.randint(90, 190)
    return level + rng.randint(-14, 14), level + rng.randint(-14, 14), level + rng.randint(-14, 14)


def ground(rng: random.Random, size: tuple[int, int], rgb: RGB) -> Image.Image:
    """A background of one color, now and then a little lighter to one side."""
    if rng.random() < 0.75:
        return Image.new("RGB", size, rgb)
    fade = rng.uniform(0.04, 0.14)
    toward = 255 if luminance(rgb) < 0.4 else 0
    far = tuple(round(channel + (toward - channel) * fade) for channel in rgb)
    ramp = Image.linear_gradient("L")
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    return Image.composite(Image.new("RGB", size, far), Image.new("RGB", size, rgb), ramp.resize(size))
