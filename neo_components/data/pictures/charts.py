"""Charts of random data as a source of pictures: bars, lines, pies and points; other styles are held out."""

from __future__ import annotations

import random
from typing import ClassVar

from neo_components.data.pictures import palette
from neo_components.data.pictures.asking import some
from neo_components.data.pictures.chart_data import (
    SERIES,
    TITLES,
    TOPS,
    ChartData,
    random_values,
    shares,
    some_names,
)
from neo_components.data.pictures.chart_drawing import STYLES, new_canvas, scatter
from neo_components.data.pictures.chart_questions import chart_turns, scatter_turns
from neo_components.data.pictures.picture import (
    COLOR,
    DETAIL,
    FRAME,
    HELD_OUT,
    MIRROR,
    SPLITS,
    TRAIN,
    TURN,
    Picture,
)
from neo_components.data.pictures.typeset import TypesetSource
from neo_components.data.pictures.words import Words
from neo_components.errors import one_of
from neo_components.registry import PICTURES

KINDS = {
    TRAIN: ("bar", "bar", "horizontal bar", "grouped bar", "line", "line", "pie", "pie", "scatter"),
    HELD_OUT: ("donut", "stacked bar", "dot"),
}
"""Styles of each split; those named twice are drawn twice as often."""
MOST_SLICES = 6


@PICTURES.register("charts")
class Charts(TypesetSource):
    """Charts with titles, axes, legends and printed values at random. Donuts, stacked bars and dots are held out."""

    origin: ClassVar[str] = "drawn from random data; fonts of PyPI packages fontpkg-*, words of wonderwords"

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """A chart with its questions."""
        one_of("split", split, SPLITS)
        kind = KINDS[split][number % len(KINDS[split])]
        canvas = new_canvas(rng, self.fonts.pick_plain(rng, split))
        data = random_data(rng, kind, self.words, canvas.ground)
        if kind == "scatter":
            trend = rng.choice((1, -1, 0))
            points = [random_points(rng, trend) for _ in data.series]
            scatter(canvas, data, points)
            first, others = scatter_turns(rng, data, points, trend)
        else:
            STYLES[kind](canvas, data)
            first, others = chart_turns(rng, kind, data, named=split == TRAIN)
        keeps = frozenset({COLOR, TURN, MIRROR, FRAME, DETAIL})
        return Picture(canvas.image.reduce(2), some(rng, first, others), "chart", keeps)


def random_data(rng: random.Random, kind: str, vocabulary: Words, ground: palette.RGB) -> ChartData:
    """Data that suits a kind of chart."""
    title = "" if rng.random() < 0.35 else rng.choice(TITLES) if rng.random() < 0.6 else rng.choice(vocabulary.nouns)
    title = title.capitalize() if title.islower() and rng.random() < 0.7 else title
    double = kind in ("grouped bar", "stacked bar") or (kind in ("line", "scatter") and rng.random() < 0.35)
    most = 4 if kind == "grouped bar" else 6 if kind in ("line", "pie", "donut") else 5
    count = rng.randint(2 if kind in ("pie", "donut") else 3, most)
    upright = kind not in ("pie", "donut", "horizontal bar")
    categories = some_names(rng, vocabulary, count, longest=4 if upright and count > 4 else 6)
    series = list(rng.choice(SERIES)) if double else [""]
    top = 100 if kind in ("pie", "donut") else rng.choice(TOPS)
    if kind in ("pie", "donut"):
        values = [shares(rng, len(categories))]
    else:
        trend = rng.choice((1, -1, 0)) if kind == "line" and not double else 0
        part = top // 2 if kind == "stacked bar" else top
        values = [random_values(rng, len(categories), part, trend) for _ in series]
    by_category = not double and (kind in ("pie", "donut") or ("bar" in kind and rng.random() < 0.5) or kind == "dot")
    colors = palette.apart(rng, len(categories) if by_category else len(series), ground)
    printed = kind != "stacked bar" and not (double and kind == "line") and rng.random() < 0.5
    return ChartData(title, categories, series, values, top, colors, by_category, printed)


def random_points(rng: random.Random, trend: int) -> list[tuple[float, float]]:
    """Three to nine points from 0 to 1, apart from each other, that rise (1), fall (-1) or do neither."""
    wanted = rng.randint(5 if trend else 3, 9)
    points: list[tuple[float, float]] = []
    for _ in range(300):
        if len(points) == wanted:
            break
        x = rng.random()
        y = rng.random() if not trend else min(1, max(0, (x if trend > 0 else 1 - x) + rng.uniform(-0.12, 0.12)))
        if all((x - px) ** 2 + (y - py) ** 2 > 0.012 for px, py in points):
            points.append((x, y))
    return points
