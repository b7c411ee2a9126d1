"""A picture of who sees whom."""

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
"""Up to so many tokens each cell has its own border."""

LABEL_HEIGHT = 0.0135
"""Height of a label as a share of the axis."""

Run = tuple[str, int]
"""A stretch of tokens with one label, and how many they are."""


def draw_mask(
    mask: Tensor,
    path: str | PathLike[str],
    labels: Sequence[str] | Sequence[Run] | None = None,
    title: str = "Who sees whom",
) -> Path:
    """Draws a mask: a row for each token that looks, a column for each token that may be seen.

    Tokens seen although they come later (the visual tokens of one image see each other) have their own colour.

    Args:
        mask: [L, L] bool, True where the row's token sees the column's.
        path: the PNG file to write.
        labels: a text for each token, or (text, number of tokens) for each stretch of them; equal neighbours share one
            label, and labels for which there is no room are left out. ``None`` numbers the tokens.
        title: stands above.

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
    axes.imshow(_colours(mask.bool().cpu()), interpolation="nearest")
    _label_axes(axes, runs, length)
    axes.set_xlabel("token seen (key)")
    axes.set_ylabel("token that looks (query)")
    axes.set_title(title, loc="left")
    _legend(axes, mask.bool().cpu())
    return save(figure, path)


def _runs(labels: Sequence[str] | Sequence[Run] | None, length: int) -> list[Run]:
    """Stretches of equally labelled tokens; empty if tokens are numbered."""
    if labels is None:
        return []
    each = [(printable(label), 1) if isinstance(label, str) else (str(label[0]), int(label[1])) for label in labels]
    covered = sum(count for _, count in each)
    if covered != length or min(count for _, count in each) < 1:
        raise ValueError(f"the labels cover {covered} tokens, the mask has {length}; label each token once")
    return [(text, sum(count for _, count in run)) for text, run in groupby(each, key=lambda pair: pair[0])]


def _colours(mask: Tensor) -> np.ndarray:
    """[L, L, 3]: hidden, seen, seen although later."""
    from matplotlib.colors import to_rgb

    palette = np.array([to_rgb(colour) for colour in (FAINT, BLUE, ORANGE)])
    later = torch.ones_like(mask).triu(1)
    return palette[(mask.int() + (mask & later).int()).numpy()]


def _label_axes(axes: Axes, runs: list[Run], length: int) -> None:
    """Labels in the middle of each stretch, white lines between the stretches (or all tokens, if they are few)."""
    edges = np.cumsum([0] + [count for _, count in runs])
    if runs:
        shown = _apart(edges, length * LABEL_HEIGHT)
        middles = [(edges[number] + edges[number + 1] - 1) / 2 for number in shown]
        texts = [runs[number][0] + (f" ×{runs[number][1]}" if runs[number][1] > 1 else "") for number in shown]
        # Tokens may hold a dollar sign, which would start a formula.
        axes.set_xticks(middles, texts, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(middles, texts, fontsize=8, parse_math=False)
    for edge in range(1, length) if length <= FEW_TOKENS else edges[1:-1]:
        axes.axhline(edge - 0.5, color="white", linewidth=0.6)
        axes.axvline(edge - 0.5, color="white", linewidth=0.6)
    axes.tick_params(length=2)
    axes.spines[:].set_visible(False)


def _apart(edges: np.ndarray, gap: float) -> list[int]:
    """Numbers of the stretches to label, the longest first, so that labels stand at least ``gap`` tokens apart."""
    middles, counts = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    shown: list[int] = []
    for number in sorted(range(len(counts)), key=lambda n: -counts[n]):
        if all(abs(middles[number] - middles[other]) >= gap for other in shown):
            shown.append(number)
    return sorted(shown)


def _legend(axes: Axes, mask: Tensor) -> None:
    from matplotlib.patches import Patch

    entries = [Patch(color=BLUE, label="sees: itself or an earlier token")]
    if mask.triu(1).any():
        entries.append(Patch(color=ORANGE, label="sees: a later token of the same image"))
    entries.append(Patch(facecolor=FAINT, edgecolor="#AAAAAA", label="does not see"))
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(handles=entries, loc="outside lower left", ncols=1, frameon=False, fontsize=9)
