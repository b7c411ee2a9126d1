"""How charts are drawn: bars, lines, pies, points, and the styles that only the held-out split has.

Each function draws into an image twice as large as wanted, which is then halved: lines become smooth.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from neo_components.data.pictures import palette
from neo_components.data.pictures.chart_data import ChartData
from neo_components.data.pictures.fonts import Face

Box = tuple[float, float, float, float]


@dataclass
class Canvas:
    """A chart in the making.

    Args:
        image: twice as large as wanted, mode RGB.
        face: font of all texts.
        size: of the texts in pixels of ``image``.
        ground: background.
        line: color of texts and axes.
        grid: whether there are lines across.
    """

    image: Image.Image
    face: Face
    size: int
    ground: palette.RGB
    line: palette.RGB
    grid: bool

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)
        self.faint = tuple((3 * back + front) // 4 for back, front in zip(self.ground, self.line, strict=True))

    def font(self, size: int = 0) -> ImageFont.FreeTypeFont:
        """The font, at the size of the texts unless it is given."""
        return self.face.at(size or self.size)

    def text(
        self, x: float, y: float, text: str, anchor: str = "mm", size: int = 0, fill: palette.RGB | None = None
    ) -> None:
        """Writes a text; ``anchor`` as in Pillow."""
        self.draw.text((x, y), text, fill=fill or self.line, font=self.font(size), anchor=anchor)

    def width(self, text: str, size: int = 0) -> float:
        """Width of a text in pixels."""
        return self.font(size).getlength(text)

    def widest(self, texts: list[str]) -> float:
        """Width of the widest text; only the two of most letters are measured, which takes as long as drawing."""
        return max(self.width(text) for text in sorted(texts, key=len)[-2:])


def titled(canvas: Canvas, data: ChartData) -> float:
    """Writes the title; returns where the space below it begins."""
    if not data.title:
        return canvas.size * (1.3 if data.printed else 0.7)  # a value may stand above the highest bar
    size = min(
        canvas.size * 1.3,
        canvas.size * 1.3 * 0.9 * canvas.image.width / canvas.width(data.title, round(canvas.size * 1.3)),
    )
    canvas.text(canvas.image.width / 2, canvas.size * 1.05, data.title, size=round(size))
    return canvas.size * 2.2


def legend(
    canvas: Canvas, names: list[str], colors: list[tuple[str, palette.RGB]], x: float, y: float, across: bool
) -> None:
    """A colored square for each name, in a line or one below the other."""
    side = canvas.size * 0.75
    for name, (_, rgb) in zip(names, colors, strict=True):
        canvas.draw.rectangle((x, y - side / 2, x + side, y + side / 2), fill=rgb)
        canvas.text(x + side * 1.4, y, name, "lm")
        if across:
            x += side * 1.4 + canvas.width(name) + canvas.size
        else:
            y += canvas.size * 1.35


def tick_step(top: int) -> int:
    """Distance of the numbers along a value axis."""
    return max(1, top // 4 if top % 4 == 0 else top // 5)


def value_axis(canvas: Canvas, data: ChartData, room: tuple[float, float], upright: bool = True) -> Box:
    """Draws axes, numbers and lines across; returns the plot's box: left, top, right, bottom.

    Args:
        canvas: to draw on.
        data: for the numbers and the longest name.
        room: where the plot may begin and end from top to bottom, labels included.
        upright: whether values go upward; otherwise to the right.
    """
    top, bottom = room
    wide = canvas.widest([str(data.top)] if upright else data.categories)
    box = (
        wide + canvas.size,
        top + canvas.size * 0.4,
        canvas.image.width - canvas.size * 0.9,
        bottom - canvas.size * 1.5,
    )
    left, top, right, bottom = box
    for tick in range(0, data.top + 1, tick_step(data.top)):
        part = tick / data.top
        if upright:
            y = bottom - part * (bottom - top)
            canvas.text(left - canvas.size * 0.35, y, str(tick), "rm")
            if canvas.grid:
                canvas.draw.line((left, y, right, y), fill=canvas.faint, width=2)
        else:
            x = left + part * (right - left)
            canvas.text(x, bottom + canvas.size * 0.85, str(tick))
            if canvas.grid:
                canvas.draw.line((x, top, x, bottom), fill=canvas.faint, width=2)
    canvas.draw.line((left, top, left, bottom, right, bottom), fill=canvas.line, width=3)
    return box


def series_legend(canvas: Canvas, data: ChartData, y: float) -> float:
    """The legend of several series below the title; returns where the space below it begins."""
    if len(data.series) < 2:
        return y
    wide = sum(canvas.size * 2.05 + canvas.width(name) for name in data.series) - canvas.size
    legend(canvas, data.series, data.colors, (canvas.image.width - wide) / 2, y + canvas.size * 0.4, across=True)
    return y + canvas.size * 1.3


def names_below(canvas: Canvas, names: list[str], left: float, bottom: float, slot: float) -> None:
    """Names of categories below the axis, all so small that none touches the next."""
    size = round(min(canvas.size, max(15, canvas.size * (slot - 5) / canvas.widest(names))))
    for category, name in enumerate(names):
        canvas.text(left + (category + 0.5) * slot, bottom + canvas.size * 0.85, name, size=size)


def color_of(data: ChartData, series: int, category: int) -> tuple[str, palette.RGB]:
    """Name and shade of a bar or slice."""
    return data.colors[category if data.by_category else series]


def bars(canvas: Canvas, data: ChartData, upright: bool = True, stacked: bool = False, thin: bool = False) -> None:
    """Bars from the axis on, those of several series side by side or one on the other; or thin sticks with a dot."""
    start = series_legend(canvas, data, titled(canvas, data))
    box = value_axis(canvas, data, (start, canvas.image.height), upright)
    left, top, right, bottom = box
    length = (bottom - top) if upright else (right - left)
    slot = ((right - left) if upright else (bottom - top)) / len(data.categories)
    beside = 1 if stacked else len(data.series)
    wide = slot * (0.12 if thin else 0.74) / beside
    if upright:
        names_below(canvas, data.categories, left, bottom, slot)
    for category, name in enumerate(data.categories):
        middle = (category + 0.5) * slot
        if not upright:
            canvas.text(left - canvas.size * 0.35, top + middle, name, "rm")
        base = 0.0
        for series, values in enumerate(data.values):
            rgb = color_of(data, series, category)[1]
            end = base + values[category] / data.top * length
            at = middle if stacked else middle + (series - (beside - 1) / 2) * wide
            half = wide / 2 - (0 if thin else 1)
            if upright:
                shape = (left + at - half, bottom - end, left + at + half, bottom - base)
                tip = (left + at, bottom - end)
            else:
                shape = (left + base, top + at - half, left + end, top + at + half)
                tip = (left + end, top + at)
            canvas.draw.rectangle(shape, fill=rgb)
            if thin:
                canvas.draw.ellipse((tip[0] - 11, tip[1] - 11, tip[0] + 11, tip[1] + 11), fill=rgb)
            if data.printed:
                away = canvas.size * (0.95 if thin else 0.55)
                if upright:
                    canvas.text(tip[0], tip[1] - away, str(values[category]))
                else:
                    text = str(values[category])
                    room = right + canvas.size * 0.8 - tip[0]
                    inside = room < canvas.width(text) + away
                    ink = (0, 0, 0) if palette.luminance(rgb) > 0.2 else (255, 255, 255)
                    x = (
                        tip[0] - (away if thin else canvas.size * 0.3)
                        if inside
                        else tip[0] + (away if thin else canvas.size * 0.3)
                    )
                    canvas.text(x, tip[1], text, "rm" if inside else "lm", fill=ink if inside and not thin else None)
            base = end if stacked else 0.0


def lines(canvas: Canvas, data: ChartData) -> None:
    """A line for each series, at times with dots at its values."""
    start = series_legend(canvas, data, titled(canvas, data))
    left, top, right, bottom = value_axis(canvas, data, (start, canvas.image.height))
    slot = (right - left) / len(data.categories)
    names_below(canvas, data.categories, left, bottom, slot)
    for values, (_, rgb) in zip(data.values, data.colors, strict=True):
        points = [
            (left + (n + 0.5) * slot, bottom - value / data.top * (bottom - top)) for n, value in enumerate(values)
        ]
        canvas.draw.line(points, fill=rgb, width=6, joint="curve")
        for (x, y), value in zip(points, values, strict=True):
            canvas.draw.ellipse((x - 7, y - 7, x + 7, y + 7), fill=rgb)
            if data.printed:
                canvas.text(x, y - canvas.size * 0.9, str(value))


def pie(canvas: Canvas, data: ChartData, hole: float = 0.0) -> None:
    """Slices clockwise from the top, with a legend to the right; ``hole`` is the part of the radius left out."""
    start = titled(canvas, data)
    wide, high = canvas.image.size
    names = [
        f"{name} {value}%" if data.printed else name
        for name, value in zip(data.categories, data.values[0], strict=True)
    ]
    legend_wide = canvas.widest(names) + canvas.size * 1.6
    radius = min(wide - legend_wide - canvas.size * 1.6, high - start - canvas.size * 0.6) / 2
    x, y = canvas.size * 0.6 + radius, (start + high - canvas.size * 0.6) / 2
    angle = -90.0
    for value, (_, rgb) in zip(data.values[0], data.colors, strict=True):
        end = angle + 3.6 * value
        canvas.draw.pieslice(
            (x - radius, y - radius, x + radius, y + radius), angle, end, fill=rgb, outline=canvas.ground, width=3
        )
        angle = end
    if hole:
        inner = radius * hole
        canvas.draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=canvas.ground)
    first = y - (len(names) - 1) / 2 * canvas.size * 1.35
    legend(canvas, names, data.colors, x + radius + canvas.size * 0.7, first, across=False)


def scatter(canvas: Canvas, data: ChartData, points: list[list[tuple[float, float]]]) -> None:
    """Points of each series; positions from 0 to 1 to the right and up."""
    start = series_legend(canvas, data, titled(canvas, data))
    left, top, right, bottom = value_axis(canvas, data, (start, canvas.image.height))
    for group, (_, rgb) in zip(points, data.colors, strict=True):
        for px, py in group:
            x, y = left + (0.05 + 0.9 * px) * (right - left), bottom - (0.05 + 0.9 * py) * (bottom - top)
            canvas.draw.ellipse((x - 9, y - 9, x + 9, y + 9), fill=rgb)


def new_canvas(rng: random.Random, face: Face) -> Canvas:
    """An empty canvas of random size and colors."""
    wide, high = rng.randint(160, 224), rng.randint(128, 184)
    dark = rng.random() < 0.15
    ground = palette.dark(rng) if dark else (255, 255, 255) if rng.random() < 0.4 else palette.pale(rng)
    line = rng.randint(205, 255) if dark else rng.randint(0, 70)
    image = Image.new("RGB", (2 * wide, 2 * high), ground)
    return Canvas(image, face, rng.randint(19, 25), ground, (line, line, line), rng.random() < 0.5)


STYLES: dict[str, Callable[[Canvas, ChartData], None]] = {
    "bar": bars,
    "horizontal bar": lambda canvas, data: bars(canvas, data, upright=False),
    "grouped bar": bars,
    "line": lines,
    "pie": pie,
    "donut": lambda canvas, data: pie(canvas, data, hole=0.55),
    "stacked bar": lambda canvas, data: bars(canvas, data, stacked=True),
    "dot": lambda canvas, data: bars(canvas, data, thin=True),
}
