"""Text as a mask, bent and turned, and how it is laid on a picture."""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from neo_components.data.pictures.fonts import Face

SMALLEST = 11
"""Size in pixels of the smallest font that is drawn."""
_MEASURE = 32


def fitting_size(face: Face, text: str, width: float, height: float, spacing: float = 0) -> int:
    """The largest size in pixels at which a text, of several lines if it has them, fits a box.

    Args:
        face: the font.
        text: lines joined by newlines.
        width: of the box in pixels.
        height: of the box in pixels.
        spacing: between letters, as a fraction of the size.
    """
    font = face.at(_MEASURE)
    lines = text.split("\n")
    wide = max(font.getlength(line) + spacing * _MEASURE * (len(line) - 1) for line in lines)
    high = line_height(font) * len(lines)
    return max(SMALLEST, int(_MEASURE * min(width / max(wide, 1), height / high)))


def line_height(font: ImageFont.FreeTypeFont) -> int:
    """Height of a line in pixels: ascenders and descenders, as the font states them."""
    ascent, descent = font.getmetrics()
    return ascent + descent


def text_mask(
    text: str, font: ImageFont.FreeTypeFont, spacing: float = 0, stroke: int = 0, align: str = "left"
) -> Image.Image:
    """The ink of a text, cropped to it: mode L, 255 where ink is.

    Args:
        text: lines joined by newlines.
        font: at its size.
        spacing: pixels between letters beyond the font's own.
        stroke: pixels by which strokes are made thicker to each side.
        align: of several lines: left, center or right.
    """
    lines, high = text.split("\n"), line_height(font)
    widths = [font.getlength(line) + spacing * max(0, len(line) - 1) for line in lines]
    edge = stroke + max(4, high // 3)  # swashes reach beyond a letter's advance
    mask = Image.new("L", (int(max(widths)) + 2 * edge, high * len(lines) + 2 * edge))
    draw = ImageDraw.Draw(mask)
    for number, (line, width) in enumerate(zip(lines, widths, strict=True)):
        x = edge + (max(widths) - width) * {"left": 0.0, "center": 0.5, "right": 1.0}[align]
        y = edge + number * high
        if not spacing:
            draw.text((x, y), line, fill=255, font=font, stroke_width=stroke)
            continue
        for letter in line:
            draw.text((x, y), letter, fill=255, font=font, stroke_width=stroke)
            x += font.getlength(letter) + spacing
    return cropped(mask)


def cropped(mask: Image.Image) -> Image.Image:
    """The part of a mask with ink.

    Raises:
        ValueError: if it has none.
    """
    box = mask.getbbox()
    if box is None:
        raise ValueError("the text has no ink in this font")
    return mask.crop(box)


def slanted(mask: Image.Image, degrees: float = 0, shear: float = 0) -> Image.Image:
    """A mask sheared to the right by ``shear`` of its height and turned counter-clockwise, cropped to its ink."""
    if shear:
        extra = int(abs(shear) * mask.height) + 1
        size = (mask.width + extra, mask.height)
        offset = -shear * mask.height if shear > 0 else 0.0
        mask = mask.transform(size, Image.Transform.AFFINE, (1, shear, offset, 0, 1, 0), Image.Resampling.BILINEAR)
    if degrees:
        mask = mask.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
    return cropped(mask) if shear or degrees else mask


def wavy(mask: Image.Image, rng: random.Random, amount: float) -> Image.Image:
    """A mask whose nine inner quarters are pulled about by up to ``amount`` of its size, as a hand is unsteady."""
    edge = max(2, round(amount * max(mask.size)))
    wide, high = mask.width + 2 * edge, mask.height + 2 * edge
    roomy = Image.new("L", (wide, high))
    roomy.paste(mask, (edge, edge))
    cells = 3
    xs, ys = [wide * n // cells for n in range(cells + 1)], [high * n // cells for n in range(cells + 1)]
    points = {}
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            points[row, column] = (x + rng.uniform(-edge, edge), y + rng.uniform(-edge, edge))
    mesh = []
    for row in range(cells):
        for column in range(cells):
            corners = (
                points[row, column],
                points[row + 1, column],
                points[row + 1, column + 1],
                points[row, column + 1],
            )
            box = (xs[column], ys[row], xs[column + 1], ys[row + 1])
            mesh.append((box, tuple(value for corner in corners for value in corner)))
    return cropped(roomy.transform((wide, high), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR))


def lay(image: Image.Image, mask: Image.Image, rgb: Sequence[int], box: tuple[float, float]) -> None:
    """Inks a mask on an image, its upper left corner at ``box``."""
    image.paste(tuple(rgb), (round(box[0]), round(box[1])), mask)


def scaled_to_fit(mask: Image.Image, width: int, height: int) -> Image.Image:
    """The mask, made smaller if it is larger than a box."""
    scale = min(width / mask.width, height / mask.height)
    if scale >= 1:
        return mask
    return mask.resize((max(1, int(mask.width * scale)), max(1, int(mask.height * scale))), Image.Resampling.BILINEAR)
