"""A figure of an attention mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from neo_components.viewers.figure import BLUE, FAINT, ORANGE, new_figure, printable, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_TOKENS = 80
"""Up to this number of tokens, cells have borders."""

LABEL_HEIGHT = 0.0135
"""Height of a label as a fraction of the axis."""

Run = tuple[str, int]
"""The label of consecutive tokens, and their number."""


def draw_mask(
    mask: Tensor,
    path: str | PathLike[str],
    labels: Sequence[str] | Sequence[Run] | None = None,
    title: str = "Attention mask",
) -> Path:
    """Draws a mask: a row for each query token, a column for each key token.

    Later keys that a query attends to (visual tokens of the same image) have a different color.

    Args:
        mask: [L, L] bool, True where the row's token attends to the column's.
        path: the PNG file to write.
        labels: a text for each token, or (text, number of tokens) for consecutive tokens; equal neighbors share one
            label, and labels without space are left out. ``None`` numbers the tokens.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: if the mask is not square, or the labels do not cover it.
    """
    if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or not len(mask):
        raise ValueError(f"a mask must be [L, L] with L > 0, got shape {tuple(mask.shape)}")
    length = len(mask)
    runs = _runs(labels, length)
    side = min(max(3.5 + 0.14 * length, 5.0), 11.0)
    figure = new_figure(side, side + 0.7)
    axes = figure.add_subplot()
    axes.imshow(_colors(mask.bool().cpu()), interpolation="nearest")
    _label_axes(axes, runs, length)
    axes.set_xlabel("key token")
    axes.set_ylabel("query token")
    axes.set_title(title, loc="left")
    _legend(axes, mask.bool().cpu())
    return save(figure, path)


def _runs(labels: Sequence[str] | Sequence[Run] | None, length: int) -> list[Run]:
    """Runs of equally labeled tokens; empty if tokens are numbered."""
    if labels is None:
        return []
    each = [(printable(label), 1) if isinstance(label, str) else (str(label[0]), int(label[1])) for label in labels]
    covered = sum(count for _, count in each)
    if covered != length or min(count for _, count in each) < 1:
        raise ValueError(f"the labels cover {covered} tokens, the mask has {length}; label each token once")
    return [(text, sum(count for _, count in run)) for text, run in groupby(each, key=lambda pair: pair[0])]


def _colors(mask: Tensor) -> np.ndarray:
    """[L, L, 3]: colors of masked, attended, and attended later tokens."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(color) for color in (FAINT, BLUE, ORANGE)])
    later = torch.ones_like(mask).triu(1)
    return palette[(mask.int() + (mask & later).int()).numpy()]


def _label_axes(axes: Axes, runs: list[Run], length: int) -> None:
    """Labels in the middle of each run, white lines between runs, or between all tokens if they are few."""
    edges = np.cumsum([0] + [count for _, count in runs])
    if runs:
        shown = _apart(edges, length * LABEL_HEIGHT)
        middles = [(edges[number] + edges[number + 1] - 1) / 2 for number in shown]
        texts = [runs[number][0] + (f" ×{runs[number][1]}" if runs[number][1] > 1 else "") for number in shown]
        # A dollar sign in a token would start a formula.
        axes.set_xticks(middles, texts, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(middles, texts, fontsize=8, parse_math=False)
    for edge in range(1, length) if length <= FEW_TOKENS else edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)


def _apart(edges: np.ndarray, gap: float) -> list[int]:
    """Indices of the runs to label, preferring long ones, so that labels are at least ``gap`` tokens apart."""
    middles, counts = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    shown: list[int] = []
    for number in sorted(range(len(counts)), key=lambda n: -counts[n]):
        if all(abs(middles[number] - middles[other]) >= gap for other in shown):
            shown.append(number)
    return sorted(shown)


def _legend(axes: Axes, mask: Tensor) -> None:
    from matplotlib.patches import Patch

    entries = [Patch(color=BLUE, label="attends to itself or an earlier token")]
    if mask.triu(1).any():
        entries.append(Patch(color=ORANGE, label="attends to a later token of the same image"))
    entries.append(Patch(facecolor=FAINT, edgecolor="#AAAAAA", label="masked"))
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles=entries, loc="outside lower left", ncols=1, frameon=False, fontsize=9)
