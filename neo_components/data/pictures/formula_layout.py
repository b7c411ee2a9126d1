"""Lays out formulas in two dimensions: fractions, powers, indices, roots and sums, as masks of ink.

A formula is a tree of :class:`Part`; each part is drawn as a mask with a base line, and a part puts those of its parts
together (after the boxes of Knuth's TeX, in their plainest form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from neo_components.data.pictures.fonts import Face
from neo_components.data.pictures.ink import line_height

SMALL = 0.7
"""Size of powers, indices and limits against that of what they belong to."""


@dataclass(frozen=True)
class Part:
    """A part of a formula.

    Args:
        kind: text, row, fraction, power, index, root or sum.
        text: what is written, of the kind text; symbol of the kind sum.
        parts: what it is made of: those of a row; above and below the line; base and raised; the radicand; of a sum
            its lower limit, its upper limit and the summand.
    """

    kind: str
    text: str = ""
    parts: tuple[Part, ...] = ()


@dataclass
class Box:
    """A drawn part.

    Args:
        mask: its ink, mode L.
        base: row of the base line in pixels from the top.
    """

    mask: Image.Image
    base: int


def lay_out(part: Part, face: Face, size: int) -> Box:
    """Draws a formula.

    Args:
        part: the formula.
        face: the font of letters and digits.
        size: in pixels of the font.

    Raises:
        ValueError: for an unknown kind of part.
    """
    size = max(11, size)
    if part.kind == "text":
        return _text(part.text, face, size)
    small = round(size * SMALL)
    if part.kind == "row":
        return _beside([lay_out(one, face, size) for one in part.parts], round(size * 0.12))
    if part.kind == "fraction":
        above, below = (lay_out(one, face, round(size * 0.85)) for one in part.parts)
        return _fraction(above, below, size)
    if part.kind in ("power", "index"):
        base, other = lay_out(part.parts[0], face, size), lay_out(part.parts[1], face, small)
        raised = base.base - round(size * 0.36) - other.mask.height
        top = raised if part.kind == "power" else base.base + round(size * 0.28) - other.base
        return _placed([(base, 0, 0), (other, base.mask.width + max(1, size // 16), top)], base.base)
    if part.kind == "root":
        return _root(lay_out(part.parts[0], face, size), size)
    if part.kind == "sum":
        lower, upper = (lay_out(one, face, small) for one in part.parts[:2])
        return _sum(part.text, lower, upper, lay_out(part.parts[2], face, size), size)
    raise ValueError(f"a part of a formula cannot be of kind {part.kind!r}")


def _text(text: str, face: Face, size: int) -> Box:
    font = face.at(size)
    ascent, _ = font.getmetrics()
    edge = size // 6
    mask = Image.new("L", (round(font.getlength(text)) + 2 * edge, line_height(font)))
    ImageDraw.Draw(mask).text((edge, 0), text, fill=255, font=font)
    # Ascenders and descenders beyond the ink would put fractions too far from their lines.
    box = mask.getbbox() or (0, 0, mask.width, mask.height)
    top = min(box[1], ascent - round(size * 0.5))
    return Box(mask.crop((max(0, box[0] - 1), top, box[2] + 1, max(box[3], ascent))), ascent - top)


def _placed(boxes: Sequence[tuple[Box, int, int]], base: int) -> Box:
    """Boxes at positions, which may be above 0, with the base line of the whole."""
    top = min(0, *(y for _, _, y in boxes))
    width = max(x + box.mask.width for box, x, _ in boxes)
    height = max(y + box.mask.height for box, _, y in boxes) - top
    mask = Image.new("L", (width, height))
    for box, x, y in boxes:
        mask.paste(255, (x, y - top), box.mask)
    return Box(mask, base - top)


def _beside(boxes: Sequence[Box], gap: int) -> Box:
    base = max(box.base for box in boxes)
    x, placed = 0, []
    for box in boxes:
        placed.append((box, x, base - box.base))
        x += box.mask.width + gap
    return _placed(placed, base)


def _fraction(above: Box, below: Box, size: int) -> Box:
    line, gap = max(1, size // 14), max(2, size // 8)
    width = max(above.mask.width, below.mask.width) + size // 4
    height = above.mask.height + below.mask.height + 2 * gap + line
    mask = Image.new("L", (width, height))
    mask.paste(above.mask, ((width - above.mask.width) // 2, 0))
    at = above.mask.height + gap
    ImageDraw.Draw(mask).rectangle((0, at, width, at + line - 1), fill=255)
    mask.paste(below.mask, ((width - below.mask.width) // 2, at + line + gap))
    return Box(mask, at + round(size * 0.3))


def _root(inner: Box, size: int) -> Box:
    line, hook, gap = max(1, size // 14), round(size * 0.5), max(2, size // 8)
    width, height = inner.mask.width + hook + gap, inner.mask.height + gap + line
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    points = [
        (0, height * 0.6),
        (hook * 0.3, height * 0.55),
        (hook * 0.6, height - 1),
        (hook, line / 2),
        (width, line / 2),
    ]
    draw.line(points, fill=255, width=line, joint="curve")
    mask.paste(inner.mask, (hook + gap // 2, gap + line))
    return Box(mask, inner.base + gap + line)


def _sum(symbol: str, lower: Box, upper: Box, inner: Box, size: int) -> Box:
    high, wide, line = round(size * 1.2), round(size * 0.9), max(2, size // 12)
    sign = Image.new("L", (wide, high))
    draw = ImageDraw.Draw(sign)
    if symbol == "sum":
        points = [
            (wide - 1, high * 0.14),
            (wide - 1, 1),
            (1, 1),
            (wide * 0.55, high / 2),
            (1, high - 2),
            (wide - 1, high - 2),
            (wide - 1, high * 0.86),
        ]
        draw.line(points, fill=255, width=line)
    else:
        draw.line([(0, line / 2), (wide, line / 2)], fill=255, width=line)
        for x in (wide * 0.2, wide * 0.8):
            draw.line([(x, 0), (x, high)], fill=255, width=line)
    width = max(wide, lower.mask.width, upper.mask.width)
    gap = 2
    boxes = [
        (upper, (width - upper.mask.width) // 2, 0),
        (Box(sign, 0), (width - wide) // 2, upper.mask.height + gap),
        (lower, (width - lower.mask.width) // 2, upper.mask.height + high + 2 * gap),
    ]
    column = _placed(boxes, upper.mask.height + gap + round(high * 0.75))
    return _beside([column, inner], round(size * 0.15))
