"""Figures of a run's results: curves, and images with questions and answers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neo_components.viewers.figure import COLORS, GREEN, RED, YELLOW, ImageLike, new_figure, save, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 4
MAX_ANSWERS = 8
SMOOTHED_FROM = 100
"""Curves of at least this number of points are drawn faint, under their running mean."""

_LINES = [color for color in COLORS if color != YELLOW]  # yellow is too pale on white
_STYLES = ["-", "--", ":", "-."]
_ROW_HEIGHTS = [2.75, 0.95]  # inches: an image, and the five lines of text below
_LINE_POINTS = 12.5

Curve = tuple[Sequence[float], Sequence[float]]


def draw_curves(
    curves: Mapping[str, Curve], path: str | PathLike[str], xlabel: str, ylabel: str, log: bool = False
) -> Path:
    """Draws curves in one plot. Those of many points are faint, with their running mean over a fiftieth of the points.

    Args:
        curves: x and y values by name.
        path: the PNG file to write.
        xlabel: label of the x axis, with unit.
        ylabel: label of the y axis, with unit.
        log: logarithmic y axis.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is no curve, one has no points, or its x and y differ in length.
    """
    if not curves:
        raise ValueError("no curve to draw; give at least one")
    figure = new_figure(8.0, 4.5)
    axes = figure.add_subplot()
    for number, (name, (x, y)) in enumerate(curves.items()):
        if len(x) != len(y) or not len(x):
            raise ValueError(
                f"curve {name!r} has {len(x)} x and {len(y)} y values; it needs equally many, at least one"
            )
        color, style = _LINES[number % len(_LINES)], _STYLES[number // len(_LINES) % len(_STYLES)]
        mean_x, mean_y = _running_mean(x, y)
        if len(mean_x) < len(x):
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.25)
        axes.plot(mean_x, mean_y, style, color=color, linewidth=1.8, marker="o" if len(x) < 20 else "", markersize=4)
        axes.lines[-1].set_label(name)
    if log:
        _log_scale(axes)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=min(len(curves), 4), frameon=False, fontsize=9)
    return save(figure, path)


def draw_answers(
    answers: Sequence[tuple[ImageLike, str, str, str, bool]], path: str | PathLike[str], title: str = ""
) -> Path:
    """Draws up to eight images, each with its question, the reference answer and the model's answer below.

    Args:
        answers: (image, question, reference answer, model's answer, whether it is right) of each.
        path: the PNG file to write.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw or more than eight.
    """
    if not 0 < len(answers) <= MAX_ANSWERS:
        raise ValueError(f"a figure shows 1 to {MAX_ANSWERS} answers, got {len(answers)}")
    columns = min(COLUMNS, len(answers))
    rows = -(-len(answers) // columns)
    figure = new_figure(2.9 * columns, sum(_ROW_HEIGHTS) * rows + 0.4 * bool(title))
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=_ROW_HEIGHTS * rows)
    for number, (image, question, answer, prediction, right) in enumerate(answers):
        row, column = 2 * (number // columns), number % columns
        color = GREEN if right else RED
        _show(figure.add_subplot(grid[row, column]), image, color)
        lines = [*_wrapped(question), f"expected: {_short(answer)}"]
        model = f"{'✓' if right else '✗'} model: {_short(prediction)}"
        _write(figure.add_subplot(grid[row + 1, column]), lines, model, color)
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    return save(figure, path)


def _show(axes: Axes, image: ImageLike, color: str) -> None:
    """The image in a colored frame."""
    axes.imshow(to_pixels(image))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=color, linewidth=3)


def _write(axes: Axes, lines: Sequence[str], last: str, color: str) -> None:
    """Lines of text, the last one in color."""
    axes.axis("off")
    for index, line in enumerate([*lines, last]):
        bold = index == len(lines)
        axes.annotate(
            line, (0, 1), (0, -_LINE_POINTS * index), xycoords="axes fraction", textcoords="offset points", va="top",
            fontsize=9, parse_math=False, color=color if bold else "black", weight="bold" if bold else "normal",
            annotation_clip=False, in_layout=False,
        )  # fmt: skip


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with ticks at 1, 2, 3 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _running_mean(x: Sequence[float], y: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The mean over windows of a fiftieth of the points; short curves are unchanged."""
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) < SMOOTHED_FROM:
        return xs, ys
    window = np.ones(len(xs) // 50) / (len(xs) // 50)
    return np.convolve(xs, window, "valid"), np.convolve(ys, window, "valid")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(_visible(text), 38, max_lines=3, placeholder=" …") or ["(no question)"]


def _short(text: str) -> str:
    return textwrap.shorten(_visible(text), 26, placeholder=" …") or "(empty)"


def _visible(text: str) -> str:
    """The text with control characters, which fonts lack, as escapes."""
    return "".join(c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode() for c in text)
