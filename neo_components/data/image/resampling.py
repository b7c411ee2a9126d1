"""Bicubic resizing in less time: Pillow's, bit by bit, and torch's, which is nearly the same.

Pillow resizes along the rows, rounds to 8 bits, then along the columns. Each new pixel is a sum of a few old ones, with
weights that are whole numbers of 2^-22 (its ``Resample.c``). Here the weights are cut in a high and a low half, so that
both sums are whole numbers that float32 holds exactly, and torch's embedding bag, which is made for sums of a few rows
of a table, works them out in vectors.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, interpolate

from neo_components.data.image import images

PRECISION = 22
"""Bits of a weight behind the point, as in Pillow for 8-bit pixels."""

LOW = 11
"""Bits of the low half of a weight."""

MOST_TAPS = 32
"""Old pixels in the sum of a new one: 32 * 255 * (2^11 - 1) is below 2^24, up to which float32 holds whole numbers."""

STRIP, TILE = 96, 128
"""Rows and columns that are turned at a time: their lines stay in the first cache."""

BLOCK = 2**17
"""Sums along the columns that are worked out at a time: they stay in the second cache."""


def resize(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The same as :func:`neo_components.data.image.images.resize`, exactly.

    Args:
        pixels: [H, W, 3] uint8.
        size: height and width in pixels.

    Returns:
        [3, H, W] uint8.
    """
    (height, width), (new_height, new_width) = pixels.shape[:2], size
    taps = max(math.ceil(4 * max(old / new, 1)) + 1 for old, new in ((height, new_height), (width, new_width)))
    # Pillow 13 begins with the columns of such a tall image, Pillow 12 does not: that one knows what it does.
    columns_first = height - new_height > max(2 * (width - new_width), 0)
    if (height, width) == size or taps > MOST_TAPS or columns_first:
        return images.resize(pixels, size)
    rows = _along_rows(pixels, new_width)
    return torch.from_numpy(_along_columns(rows, new_height)).permute(1, 0, 2)


def resize_fast(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes by torch's bicubic filter for bytes: least time, and some values differ from Pillow's by 1 or 2 of 255.

    Args:
        pixels: [H, W, 3] uint8.
        size: height and width in pixels.

    Returns:
        [3, H, W] uint8.
    """
    if pixels.shape[:2] == size:
        return images.resize(pixels, size)
    planes = torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)
    return interpolate(planes[None], size, mode="bicubic", antialias=True)[0]


def _along_rows(pixels: np.ndarray, new_width: int) -> np.ndarray:
    """[H, W, 3] -> [H, 3, new_width] uint8."""
    height, width = pixels.shape[:2]
    if new_width == width:
        return np.ascontiguousarray(pixels.transpose(0, 2, 1))
    rows = np.empty((height, 3, new_width), np.uint8)
    turned = np.zeros((width, 3, STRIP), np.uint8)  # behind the last row lies what was there before
    for start in range(0, height, STRIP):
        strip = pixels[start : start + STRIP]
        turned[:, :, : len(strip)] = strip.transpose(1, 2, 0)
        new = _sums(turned.reshape(width, -1), *_weights(width, new_width)).reshape(new_width, 3, STRIP)
        for tile in range(0, new_width, TILE):
            some = new[tile : tile + TILE, :, : len(strip)]
            rows[start : start + STRIP, :, tile : tile + TILE] = some.transpose(2, 1, 0)
    return rows


def _along_columns(rows: np.ndarray, new_height: int) -> np.ndarray:
    """[H, 3, W] -> [new_height, 3, W] uint8."""
    height, _, width = rows.shape
    if new_height == height:
        return rows
    table, new = rows.reshape(height, -1), np.empty((new_height, 3, width), np.uint8)
    places, weights = _weights(height, new_height)
    step = max(BLOCK // (3 * width), 8)
    for start in range(0, new_height, step):
        mine, own = places[:, start : start + step], weights[:, start : start + step]
        first, last = int(mine[0, 0, 0]), int(mine[0, -1, -1]) + 1
        new[start : start + step] = _sums(table[first:last], mine - first, own).reshape(-1, 3, width)
    return new


def _sums(table: np.ndarray, places: Tensor, weights: Tensor) -> np.ndarray:
    """Sums of neighbouring rows [old, n], rounded to whole numbers of 0 to 255 -> [new, n]; all uint8."""
    taps = places.shape[-1]
    found = embedding_bag(
        places.reshape(-1, taps),
        torch.from_numpy(table).float(),
        per_sample_weights=weights.reshape(-1, taps),
        mode="sum",
    )
    high, low = found.chunk(2)
    exact = high.add_(low.floor_(), alpha=2.0**-LOW)
    return exact.add_(0.5).clamp_(0, 255).numpy().astype(np.uint8)


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> tuple[Tensor, Tensor]:
    """Which old pixels make a new one, [2, new, taps] int32, and the halves of their weights, the high ones first.

    Source: ``precompute_coeffs`` and ``normalize_coeffs_8bpc`` of Pillow's ``Resample.c``, its bicubic filter.
    """
    scale = old / new
    reach = 2.0 * max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    first = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + reach + 0.5).astype(np.int64), old)
    places = first[:, None] + np.arange((last - first).max())
    weights = _bicubic((places - centers[:, None] + 0.5) * (1.0 / max(scale, 1.0)))
    weights[places >= last[:, None]] = 0.0
    weights /= np.add.accumulate(weights, axis=1)[:, -1:]  # added one after the other, as there
    units = np.trunc(weights * 2**PRECISION + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    # In units of a pixel's value, and in those of the last place of the high half: what is behind the point there
    # cannot change a sum that is rounded further up.
    halves = np.stack([(units >> LOW) * 2.0 ** (LOW - PRECISION), (units & (2**LOW - 1)) * 2.0**-LOW])
    places = np.minimum(places, old - 1).astype(np.int32)
    return torch.from_numpy(np.stack([places, places])), torch.from_numpy(halves.astype(np.float32))


def _bicubic(distance: np.ndarray) -> np.ndarray:
    """The cubic convolution kernel with a = -0.5."""
    x = np.abs(distance)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
