"""Common parts of all figures: a palette for color-blind readers, new figures, saving, and pixels of any image.

matplotlib is imported when a figure is drawn, without pyplot: no global state and no display is needed.
"""

from __future__ import annotations

import warnings
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from neo_components.data.image.files import ImageSource, open_image
from neo_components.data.image.images import IMAGE_MEAN, IMAGE_STD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150

# Okabe and Ito's palette.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = COLORS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000",
)  # fmt: skip
FAINT = "#EDEDED"

ImageLike = ImageSource | Tensor
"""A path, the bytes of an image file, a Pillow image, or a normalized tensor [3, H, W]."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Figure, path: str | PathLike[str]) -> Path:
    """Writes a figure as PNG; creates the folder if needed.

    Raises:
        ValueError: if the name does not end in ``.png``.
    """
    file = Path(path)
    if file.suffix.lower() != ".png":
        raise ValueError(f"figures are written as PNG: give a name that ends in .png, got {fspath(path)!r}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # A model may answer in any script; a character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # The tight box keeps long titles and trims the margin of a fixed aspect ratio.
        figure.savefig(
            file,
            format="png",
            dpi=DPI,
            facecolor="white",
            bbox_inches="tight",
            pad_inches=0.12,
            metadata={"Software": None},
        )
    return file


def to_pixels(image: ImageLike) -> np.ndarray:
    """Pixels for display: [H, W, 3] uint8.

    Args:
        image: a tensor [3, H, W] is uint8 pixels, or float with the ImageNet normalization of ``load_image``, which is
            undone.

    Raises:
        ValueError: if a tensor is not [3, H, W].
    """
    if not isinstance(image, Tensor):
        opened: Image.Image = open_image(image)
        return np.asarray(opened.convert("RGB"))
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"an image tensor must be [3, H, W], got shape {tuple(image.shape)}")
    if image.dtype == torch.uint8:
        return image.cpu().permute(1, 2, 0).numpy()
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    pixels = (image.detach().float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def printable(text: str) -> str:
    """A token's text with visible whitespace."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"
