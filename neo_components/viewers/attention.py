"""A figure of the attention from a token to an image."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np
from torch import Tensor

from neo_components.viewers.figure import ImageLike, new_figure, save, to_pixels

_HEAT = "viridis"


def draw_attention(image: ImageLike, weights: Tensor, path: str | PathLike[str], title: str = "Attention") -> Path:
    """Draws an image, and beside it the image in gray under a heat map of the attention to its visual tokens.

    Args:
        image: a path, bytes, a Pillow image or a normalized tensor [3, H, W].
        weights: [rows, columns], attention weights of the image's grid of visual tokens.
        path: the PNG file to write.
        title: of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: if the weights are not a matrix of finite numbers.
    """
    if weights.ndim != 2 or not weights.numel() or not weights.isfinite().all():
        raise ValueError(f"weights must be [rows, columns] of finite numbers, got shape {tuple(weights.shape)}")
    pixels = to_pixels(image)
    height, width = pixels.shape[:2]
    # About 4 inches wide; very wide or tall images stay within a page.
    tall = min(max(4.0 * height / width, 1.5), 8.0)
    wide = min(max(tall * width / height, 1.8), 4.0)
    figure = new_figure(2 * wide + 1.0, tall + 0.9)
    plain, heated = figure.subplots(1, 2)
    plain.imshow(pixels)
    plain.set_title("image", fontsize=10)
    heated.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
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
