"""Distorts pictures as the world does: backgrounds, crops, turns, sizes, gray, inverted, blur, noise, JPEG.

A picture states what its answers rest on (``Picture.keeps``); no distortion changes that.
"""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from neo_components.data.pictures.backgrounds import background, plain_color
from neo_components.data.pictures.picture import COLOR, DETAIL, FRAME, MIRROR, TURN, Picture

SHORTEST, LONGEST = 64, 224
"""Limits of the longer side of a distorted picture in pixels."""

PLAIN = 0.25
"""Probability that a picture is left as it is, on a plain background."""

_RATIOS = (4 / 3, 3 / 4, 1.2, 1 / 1.2, 1.5, 1 / 1.5, 1.9, 1 / 1.9, 2.6, 1 / 2.6)
_LEAST_SHORT_SIDE = 48


def distort(picture: Picture, rng: random.Random) -> Image.Image:
    """A distorted version of a picture.

    Args:
        picture: is not changed.
        rng: the only source of randomness.

    Returns:
        mode RGB, longer side of :data:`SHORTEST` to :data:`LONGEST` pixels, sides at most 3 to 1 unless the picture
        itself is longer.
    """
    keeps, plain = picture.keeps, rng.random() < PLAIN
    image = picture.image if picture.image.mode in ("RGB", "RGBA") else picture.image.convert("RGB")
    if not plain:
        image = _turned(image, keeps, rng)
    image = _on_background(image, keeps, rng, plain)
    image = _sized(image, keeps, rng)
    if not plain:
        image = _degraded(_colored(image, keeps, rng), keeps, rng)
    return image


def _turned(image: Image.Image, keeps: frozenset[str], rng: random.Random) -> Image.Image:
    """Mirrored and rotated, where answers do not rest on it; an image with a background of its own stays upright."""
    if MIRROR not in keeps and rng.random() < 0.3:
        image = ImageOps.mirror(image)
    if TURN in keeps or image.mode != "RGBA":
        return image
    chance = rng.random()
    if chance < 0.3:
        angle = rng.uniform(-20, 20)
    elif chance < 0.36:
        angle = rng.uniform(0, 360)
    else:
        return image
    return image.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def _on_background(image: Image.Image, keeps: frozenset[str], rng: random.Random, plain: bool) -> Image.Image:
    if image.mode == "RGB":
        return image if plain else _framed(image, keeps, rng)
    ratio = rng.choice(_RATIOS) if not plain and rng.random() < 0.4 else 1.0
    filled = rng.uniform(0.8, 1.0) if plain else rng.triangular(0.5, 1.0, 0.95)
    width, height = image.size
    canvas_width = max(width, height * ratio) / filled
    canvas_height = canvas_width / ratio
    if canvas_height < height:
        canvas_width, canvas_height = height / filled * ratio, height / filled
    size = (max(round(canvas_width), width), max(round(canvas_height), height))
    free = (size[0] - width, size[1] - height)
    at = (free[0] // 2, free[1] // 2) if plain else (rng.randint(0, free[0]), rng.randint(0, free[1]))
    below = background(size, image, rng, plain)
    below.paste(image, at, image)
    return below


def _framed(image: Image.Image, keeps: frozenset[str], rng: random.Random) -> Image.Image:
    """A little cropped, or on a larger canvas."""
    width, height = image.size
    chance = rng.random()
    if chance < 0.25 and FRAME not in keeps:
        left, top, right, bottom = (rng.uniform(0, 0.08) for _ in range(4))
        return image.crop(
            (round(width * left), round(height * top), round(width * (1 - right)), round(height * (1 - bottom)))
        )
    if chance < 0.4 and FRAME not in keeps:
        wide, high = (round(side * rng.uniform(1.02, 1.4)) for side in image.size)
        below = Image.new("RGB", (wide, high), plain_color(rng))
        below.paste(image, (rng.randint(0, wide - width), rng.randint(0, high - height)))
        return below
    return image


def _sized(image: Image.Image, keeps: frozenset[str], rng: random.Random) -> Image.Image:
    """Of a random size; fine print keeps its own."""
    longest = max(image.size)
    if DETAIL in keeps:
        side = max(longest, SHORTEST)
    else:
        side = rng.choice(
            (96, 112, 128, 128, 144, 160, 192, rng.randint(SHORTEST, LONGEST), rng.randint(SHORTEST, LONGEST))
        )
        side = max(side, round(_LEAST_SHORT_SIDE * longest / min(image.size)))
    side = min(side, LONGEST)
    return image if side == longest else _scaled(image, side / longest)


def _scaled(image: Image.Image, factor: float, how: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), how)


def _colored(image: Image.Image, keeps: frozenset[str], rng: random.Random) -> Image.Image:
    if COLOR not in keeps:
        chance = rng.random()
        if chance < 0.12:
            image = ImageOps.grayscale(image).convert("RGB")
        elif chance < 0.18:
            image = ImageOps.invert(image)
        elif chance < 0.21:
            image = ImageOps.invert(ImageOps.grayscale(image)).convert("RGB")
        elif chance < 0.24:
            image = (
                ImageOps.grayscale(image).point(lambda value: 255 * (value > 128)).convert("RGB")
                if DETAIL not in keeps
                else image
            )
        elif chance < 0.32:
            hue, *rest = image.convert("HSV").split()
            shift = rng.randint(0, 255)
            image = Image.merge("HSV", (hue.point(lambda value: (value + shift) % 256), *rest)).convert("RGB")
    if rng.random() < 0.25:
        image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.5, 1.3))
    if rng.random() < 0.2:
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.7, 1.2))
    return image


def _degraded(image: Image.Image, keeps: frozenset[str], rng: random.Random) -> Image.Image:
    """Low resolution, blur, noise or JPEG; mild where answers rest on fine print."""
    mild = DETAIL in keeps
    chance = rng.random()
    if chance < 0.18 and not mild:
        low = min(1.0, rng.randint(24, 64) / max(image.size))
        how = rng.choice((Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC))
        return _scaled(image, low, Image.Resampling.BOX).resize(image.size, how)
    if chance < 0.26:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6 if mild else 1.8)))
    if chance < 0.36:
        return _noisy(image, rng.uniform(3, 10 if mild else 28), rng)
    if chance < 0.5:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(50, 85) if mild else rng.randint(12, 70))
        return Image.open(file).convert("RGB")
    if chance < 0.55 and not mild and min(image.size) > 60:
        return image.filter(
            rng.choice((ImageFilter.MinFilter(3), ImageFilter.MaxFilter(3)))
        )  # thicker or thinner lines
    return image


def _noisy(image: Image.Image, deviation: float, rng: random.Random) -> Image.Image:
    numbers = np.random.default_rng(rng.getrandbits(32))
    noise = numbers.normal(128, deviation, (image.height, image.width)).clip(0, 255).astype(np.uint8)
    return ImageChops.add(image, Image.fromarray(noise).convert("RGB"), offset=-128)
