"""Backgrounds for pictures that have none: plain, gradients, stripes, checks, clouds, noise; drawings show on them."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

Rgb = tuple[int, int, int]

_CONTRAST = 70.0
"""Least difference in brightness between a background and what lies on it, of 255."""


def background(size: tuple[int, int], drawing: Image.Image, rng: random.Random, plain: bool = False) -> Image.Image:
    """A background on which a drawing can be seen.

    Args:
        size: width and height in pixels.
        drawing: mode RGBA.
        rng: the only source of randomness.
        plain: of one color, mostly white.
    """
    light = brightness(drawing)
    one = _seen(light, rng, white=0.6 if plain else 0.3)
    chance = 0.0 if plain else rng.random()
    if chance < 0.5:
        return Image.new("RGB", size, one)
    other = _seen(light, rng, white=0.1)
    if abs(_bright(one) - _bright(other)) > 140:  # black and white stripes hide everything
        other = one if _bright(one) > 128 else (20, 20, 40)
    if chance < 0.62:
        mask = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270))).resize(size)
    elif chance < 0.7:
        mask = Image.radial_gradient("L").resize(size)
    elif chance < 0.78:
        mask = _stripes(size, rng)
    elif chance < 0.84:
        mask = _checks(size, rng)
    elif chance < 0.93:
        return _clouds(size, light, rng)
    else:
        mask = _grain(size, rng)
    return Image.composite(Image.new("RGB", size, one), Image.new("RGB", size, other), mask)


def brightness(drawing: Image.Image) -> float:
    """Mean brightness of the opaque pixels, 0 to 255."""
    pixels = np.asarray(drawing.resize((32, 32), Image.Resampling.NEAREST), np.float32).reshape(-1, 4)
    weight = pixels[:, 3]
    return float((pixels[:, :3] @ (0.299, 0.587, 0.114) * weight).sum() / max(weight.sum(), 1))


def plain_color(rng: random.Random) -> Rgb:
    """White, black, gray or any color."""
    chance = rng.random()
    if chance < 0.4:
        return (255, 255, 255)
    if chance < 0.5:
        return (0, 0, 0)
    if chance < 0.6:
        gray = rng.randint(60, 230)
        return (gray, gray, gray)
    return (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))


def _bright(color: Rgb) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _seen(light: float, rng: random.Random, white: float) -> Rgb:
    """A color unlike a brightness."""
    if light < 200 and rng.random() < white:
        return (255, 255, 255)
    for _ in range(12):
        color = plain_color(rng)
        if rng.random() < 0.5:  # pale
            color = tuple(255 - (255 - value) // 3 for value in color)  # type: ignore[assignment]
        if abs(_bright(color) - light) > _CONTRAST:
            return color
    return (255, 255, 255) if light < 128 else (0, 0, 0)


def _stripes(size: tuple[int, int], rng: random.Random) -> Image.Image:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    along = rng.choice((x, y, x + y, x - y))
    return Image.fromarray((((along // rng.randint(3, 20)) % 2) * 255).astype(np.uint8))


def _checks(size: tuple[int, int], rng: random.Random) -> Image.Image:
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    side = rng.randint(4, 24)
    return Image.fromarray((((x // side + y // side) % 2) * 255).astype(np.uint8))


def _clouds(size: tuple[int, int], light: float, rng: random.Random) -> Image.Image:
    """A few random colors, enlarged: like a photograph out of focus."""
    side = rng.randint(2, 7)
    small = Image.new("RGB", (side, side))
    small.putdata([_seen(light, rng, white=0.1) for _ in range(side * side)])
    return small.resize(size, Image.Resampling.BICUBIC)


def _grain(size: tuple[int, int], rng: random.Random) -> Image.Image:
    numbers = np.random.default_rng(rng.getrandbits(32))
    grain = rng.randint(1, 4)
    noise = numbers.integers(0, 256, (size[1] // grain + 1, size[0] // grain + 1), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.NEAREST)
