"""A picture of where in an image a token looks."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor

from neo_components.viewers.figure import Picture, new_figure, save, to_pixels

_HEAT = "viridis"


def draw_attention(image: Picture, weights: Tensor, path: str | PathLike[str], title: str = "Attention") -> Path:
    """Draws an image, and beside it the same in grey under a heat map of the attention to its visual tokens.

    Args:
        image: a path, bytes, a Pillow image or a normalised tensor [3, H, W].
        weights: [rows, columns] weights of the image's visual tokens, in the order of the image's grid.
        path: the PNG file to write.
        title: stands above.

    Returns:
        ``path``.

    Raises:
        ValueError: if the weights are not a matrix of finite numbers.
    """
    if weights.ndim != 2 or not weights.numel() or not weights.isfinite().all():
        raise ValueError(f"weights must be [rows, columns] of finite numbers, got shape {tuple(weights.shape)}")
    picture = to_pixels(image)
    height, width = picture.shape[:2]
    # Each picture is about 4 inches wide; very wide or tall ones stay within a page.
    tall = min(max(4.0 * height / width, 1.5), 8.0)
    wide = min(max(tall * width / height, 1.8), 4.0)
    figure = new_figure(2 * wide + 1.0, tall + 0.9)
    plain, heated = figure.subplots(1, 2)
    plain.imshow(picture)
    plain.set_title("image", fontsize=10)
    heated.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=255)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    heat = heated.imshow(
        weights.detach().float().cpu().numpy(), cmap=_HEAT, alpha=0.7, extent=extent, interpolation="nearest", vmin=0
    )
    heated.set_title(f"{weights.shape[0]} × {weights.shape[1]} visual tokens", fontsize=10)
    for edge in np.linspace(-0.5, width - 0.5, weights.shape[1] + 1)[1:-1]:
        heated.axvline(edge, color="white", linewidth=0.4)
    for edge in np.linspace(-0.5, height - 0.5, weights.shape[0] + 1)[1:-1]:
        heated.axhline(edge, color="white", linewidth=0.4)
    for axes in (plain, heated):
        axes.set_xticks([])
        axes.set_yticks([])
    figure.colorbar(heat, ax=[plain, heated], shrink=0.9, label="attention weight")
    figure.suptitle(title, fontsize=12, parse_math=False)
    return save(figure, path)
