"""Figures of training data: samples as the model reads them, and histograms of lengths and image sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neo_components.types import IGNORED, InputSpec, Sample
from neo_components.viewers.figure import BLUE, GREEN, ORANGE, new_figure, save, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 84
"""Characters in a line of a sample's text."""
LINES = 13
FONT = 7.4
_STEP, _LINE = 0.602 * FONT, 1.62 * FONT
"""Width of a character and height of a line in points; DejaVu Sans Mono's characters are 0.602 of its size wide."""
TARGET = "#BFE8D9"
"""Background of target tokens."""
MAX_SAMPLES = 10
MAX_IMAGES = 4
BINS = 40

Run = tuple[str, bool]
"""A piece of text, and whether it is a target."""


def draw_samples(
    samples: Sequence[Sample],
    spec: InputSpec,
    decode: Callable[[list[int]], str],
    path: str | PathLike[str],
    title: str = "",
) -> Path:
    """Draws up to ten samples: their images, and their tokens as text; target tokens have a green background.

    Args:
        samples: with labels and images.
        spec: of the model; its image tokens are drawn as ``[12 visual]``.
        decode: from token ids to text.
        path: the PNG file to write.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is nothing to draw or more than ten.
    """
    if not 0 < len(samples) <= MAX_SAMPLES:
        raise ValueError(f"a figure shows 1 to {MAX_SAMPLES} samples, got {len(samples)}")
    rows = -(-len(samples) // 2)
    figure = new_figure(16.0, 2.75 * rows + 0.4 * bool(title))
    grid = figure.add_gridspec(rows, 4, width_ratios=[1, 2.4, 1, 2.4])
    for number, sample in enumerate(samples):
        row, column = divmod(number, 2)
        _show_images(figure.add_subplot(grid[row, 2 * column]), sample)
        axes = figure.add_subplot(grid[row, 2 * column + 1])
        axes.set_title(f"{sample.key}: {len(sample.token_ids)} tokens", fontsize=9, loc="left", parse_math=False)
        _write(axes, text_runs(sample, spec, decode))
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    return save(figure, path)


def text_runs(sample: Sample, spec: InputSpec, decode: Callable[[list[int]], str]) -> list[Run]:
    """The text of a sample, split into targets and other text; visual tokens are counted."""
    ids = sample.token_ids.tolist()
    target = [False] * len(ids) if sample.labels is None else (sample.labels != IGNORED).tolist()
    runs: list[Run] = []
    start = 0
    for stop in range(1, len(ids) + 1):
        kind = (ids[start] == spec.image_token_id, target[start])
        if stop < len(ids) and (ids[stop] == spec.image_token_id, target[stop]) == kind:
            continue
        runs.append((f"[{stop - start} visual]" if kind[0] else decode(ids[start:stop]), kind[1]))
        start = stop
    return runs


def draw_histograms(
    lengths: np.ndarray, visual: np.ndarray, sizes: np.ndarray, path: str | PathLike[str], title: str = ""
) -> Path:
    """Draws histograms of the lengths of samples and the sizes of images.

    Args:
        lengths: [samples] numbers of tokens.
        visual: [samples] numbers of visual tokens.
        sizes: [images, 2] height and width in pixels; may be empty.
        path: the PNG file to write.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: if there is no sample.
    """
    if not len(lengths):
        raise ValueError("no usable sample, nothing to draw")
    figure = new_figure(12.0, 6.4)
    tokens, fraction, side, aspect = figure.subplots(2, 2).flat
    _histogram(tokens, lengths, "tokens per sample", BLUE)
    _histogram(fraction, visual / lengths, "visual fraction of a sample's tokens", ORANGE, low=0.0, high=1.0)
    if len(sizes):
        _histogram(side, np.sqrt(sizes.prod(axis=1)), "square root of an image's pixels", GREEN)
        _histogram(aspect, np.log2(sizes[:, 1] / sizes[:, 0]), "width / height, log2", GREEN)
    else:
        for axes in (side, aspect):
            axes.axis("off")
            axes.annotate("no images", (0.5, 0.5), xycoords="axes fraction", ha="center")
    if title:
        figure.suptitle(title, fontsize=12, parse_math=False)
    return save(figure, path)


def _histogram(
    axes: Axes, values: np.ndarray, name: str, color: str, low: float | None = None, high: float | None = None
) -> None:
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    room = (low - 0.5, high + 0.5) if low == high else (low, high)
    axes.hist(values, bins=BINS, range=room, color=color)
    axes.set_xlabel(name)
    axes.set_ylabel("count")
    axes.spines[["top", "right"]].set_visible(False)


def _show_images(axes: Axes, sample: Sample) -> None:
    """The first images side by side, after resizing."""
    axes.axis("off")
    if not sample.images:
        axes.annotate("text only", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#888888")
        return
    shown = [to_pixels(image) for image in sample.images[:MAX_IMAGES]]
    height = max(pixels.shape[0] for pixels in shown)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 8), (0, 0)), constant_values=255) for p in shown]
    axes.imshow(np.concatenate(padded, axis=1)[:, :-8])
    sizes = ", ".join(f"{p.shape[0]}x{p.shape[1]}" for p in shown)
    more = f" and {len(sample.images) - MAX_IMAGES} more" if len(sample.images) > MAX_IMAGES else ""
    axes.set_title(f"{sizes}{more}", fontsize=8)


def _write(axes: Axes, runs: Sequence[Run]) -> None:
    """Text in a grid of characters, so that targets can have a background."""
    axes.axis("off")
    lines = _laid_out(runs)
    for index, line in enumerate(lines[:LINES]):
        last = index == LINES - 1 and len(lines) > LINES
        for column, text, target in [(0, "…", False)] if last else line:
            axes.annotate(
                text, (0, 1), (_STEP * column, -_LINE * (index + 0.5)), xycoords="axes fraction",
                textcoords="offset points", va="center", family="monospace", fontsize=FONT, parse_math=False,
                annotation_clip=False, in_layout=False,
                bbox={"facecolor": TARGET, "edgecolor": "none", "pad": 1.0} if target else None,
            )  # fmt: skip


def _laid_out(runs: Sequence[Run]) -> list[list[tuple[int, str, bool]]]:
    """(column, text, target) of each line, broken at line breaks and at the width."""
    lines: list[list[tuple[int, str, bool]]] = [[]]
    column = 0
    for text, target in runs:
        for number, piece in enumerate(text.split("\n")):
            if number:
                # Shows a line break that is a target.
                if target:
                    lines[-1].append((column, "↵", True))
                lines.append([])
                column = 0
            while piece:
                room = WIDTH - column
                if room <= 0:
                    lines.append([])
                    column, room = 0, WIDTH
                lines[-1].append((column, piece[:room], target))
                column += len(piece[:room])
                piece = piece[room:]
    return lines if lines[-1] else lines[:-1]
