"""Names of colors, and the color that most of a drawing has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
MAIN = 0.6
"""Least fraction of the pixels for a main color."""
SECOND = 0.25
"""Most that another color may have beside it."""

_BLACK, _WHITE, _GRAY, _RED, _ORANGE, _YELLOW, _GREEN, _BLUE, _PURPLE, _PINK, _BROWN = range(len(NAMES))


def named(rgb: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Index in :data:`NAMES` of each color, -1 where two names would do.

    Args:
        rgb: of shape (n, 3).
    """
    values = rgb.astype(np.float32) / 255
    high, low = values.max(1), values.min(1)
    spread = high - low
    saturation = np.where(high > 0, spread / np.maximum(high, 1e-6), 0)
    r, g, b = values.T
    safe = np.maximum(spread, 1e-6)
    hue = np.select([high == r, high == g], [((g - b) / safe) % 6, (b - r) / safe + 2], (r - g) / safe + 4) * 60
    names = np.full(len(rgb), -1)
    # Degrees of hue between which nobody disagrees; the gaps stay without a name.
    for index, first, last in (
        (_RED, 0, 10), (_ORANGE, 20, 40), (_YELLOW, 46, 64), (_GREEN, 80, 160), (_BLUE, 192, 250),
        (_PURPLE, 262, 292), (_PINK, 305, 340), (_RED, 350, 360),
    ):  # fmt: skip
        names[(hue >= first) & (hue <= last)] = index
    names[(names == _RED) & (saturation < 0.5) & (high > 0.75)] = _PINK
    names[(hue >= 12) & (hue <= 42) & (high < 0.68) & (saturation > 0.3)] = _BROWN
    names[(names == _ORANGE) & (saturation < 0.6)] = -1  # skin and sand
    names[(saturation < 0.35) & (names != _BROWN)] = -1
    names[(saturation < 0.12) | (spread < 0.06)] = _GRAY
    names[(names == _GRAY) & (high > 0.93)] = _WHITE
    names[(high < 0.17)] = _BLACK
    return names


def main_color(image: Image.Image) -> str | None:
    """The name of the color of an RGBA drawing, if one clearly dominates its opaque pixels."""
    fractions = _fractions(image)
    if fractions is None:
        return None
    first, second = np.argsort(fractions)[::-1][:2]
    return NAMES[first] if fractions[first] >= MAIN and fractions[second] <= SECOND else None


def colors_in(image: Image.Image, least: float) -> set[str]:
    """The names of the colors that at least a fraction of the opaque pixels of an RGBA drawing have."""
    fractions = _fractions(image)
    return set() if fractions is None else {NAMES[index] for index in np.flatnonzero(fractions >= least)}


def _fractions(image: Image.Image) -> NDArray[np.float64] | None:
    """Of the opaque pixels, by color; ``None`` if they are too few."""
    pixels = np.asarray(image.resize((32, 32), Image.Resampling.NEAREST)).reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 200][:, :3]
    if len(pixels) < 40:
        return None
    found = named(pixels)
    return np.bincount(found[found >= 0], minlength=len(NAMES)) / len(pixels)
