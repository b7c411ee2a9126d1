"""Keeps the held-out pairs of color and shape (``shapes.py``) out of named drawings, their inks and their questions."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from neo_components.data.pictures.colors import colors_in
from neo_components.data.pictures.palette import NAMES
from neo_components.data.pictures.shapes import HELD_OUT_PAIRS, SHAPES
from neo_components.data.skip_counts import SampleError

PART = 0.1
"""Least fraction of a drawing's pixels that count as its color: a white arrow on a blue button is a white arrow."""

_SINGULAR = {shape + ending: shape for shape in SHAPES for ending in ("s", "es")}


def words_in(name: str) -> set[str]:
    """The words of a name in small letters, shapes in the singular."""
    return {_SINGULAR.get(word, word) for word in name.lower().replace("-", " ").split()}


@lru_cache(maxsize=20_000)
def held_out_colors(name: str) -> frozenset[str]:
    """The colors in which training must not show a thing: ``broken heart`` -> orange, purple, white."""
    words = words_in(name)
    shapes = {shape for shape in SHAPES if words.issuperset(shape.split())}
    return frozenset(color for color, shape in HELD_OUT_PAIRS if shape in shapes)


def names_held_out(name: str) -> bool:
    """Whether a name has both words of a held-out pair: ``white large square``."""
    return not held_out_colors(name).isdisjoint(words_in(name) & set(NAMES))


def refuse_held_out(name: str, image: Image.Image) -> None:
    """Refuses a drawing of a shape that has a color in which that shape is held out.

    Args:
        name: what is shown, and its kinds.
        image: mode RGBA.

    Raises:
        SampleError: (a ``ValueError``) if it shows such a pair.
    """
    if found := held_out_colors(name) & colors_in(image, PART):
        raise SampleError(f"{name!r} in {', '.join(sorted(found))} is a held-out pair of color and shape", "no_answer")
