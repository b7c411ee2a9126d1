"""From an image file to the normalized pixels that a patch embedding reads.

Sizes follow the smart resize of the Qwen2-VL family, which NEO uses: sides are multiples of one visual token's side,
the area stays within limits, and the aspect ratio is kept as well as that allows. Pixels are resized by Pillow's
bicubic filter and normalized with the ImageNet mean and standard deviation.

EXIF orientation is not applied, as in the released model's code: pixels are taken as they are stored.
"""

from __future__ import annotations

import math
from os import PathLike
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from neo_components.data.image.files import MAX_DECODED_PIXELS, ImageError, ImageSource, first_line, open_image
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.data.packing import IMAGE_MEAN as IMAGE_MEAN
from neo_components.data.packing import IMAGE_STD as IMAGE_STD
from neo_components.data.packing import normalize

MAX_ASPECT_RATIO = 200
Transparency = Literal["drop", "contrast"]


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size that an image is resized to.

    Each side is rounded to a multiple of ``factor``. An area over ``max_pixels`` is scaled down with sides rounded
    down, one under ``min_pixels`` is scaled up with sides rounded up. No side falls below ``factor``, so a very long
    image may exceed ``max_pixels``.

    Args:
        height: pixels.
        width: pixels.
        factor: side of one visual token in pixels (32 for NEO).
        min_pixels: smallest area in pixels.
        max_pixels: largest area in pixels.

    Returns:
        height and width in pixels, multiples of ``factor``.

    Raises:
        ImageError: (a ``ValueError``) if a side is not positive or the aspect ratio is over 200.
        ValueError: if ``factor`` or the limits are impossible.
    """
    if factor < 1 or not 0 < min_pixels <= max_pixels:
        raise ValueError(
            f"need factor >= 1 and 0 < min_pixels <= max_pixels, got factor={factor}, min_pixels={min_pixels}, "
            f"max_pixels={max_pixels}"
        )
    if height < 1 or width < 1:
        raise ImageError(f"image of {width}x{height} pixels is empty; both sides must be at least 1", "empty")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"image of {width}x{height} pixels has an aspect ratio over {MAX_ASPECT_RATIO}; crop it", "aspect_ratio"
        )
    rows, columns = (max(1, round(side / factor)) for side in (height, width))
    area = factor * factor
    if rows * columns * area > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / scale / factor)) for side in (height, width))
    elif rows * columns * area < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) for side in (height, width))
    return rows * factor, columns * factor


def max_pixels_per_image(count: int, min_pixels: int, max_pixels: int) -> int:
    """Largest area of each of ``count`` images of one sample: ``2 * max_pixels / count``, at least ``min_pixels``.

    A single image may use ``max_pixels``. Source: NEO's pre-processing.
    """
    return max(2 * max_pixels // count, min_pixels) if count > 1 else max_pixels


def image_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int, name: str = "image"
) -> tuple[int, int]:
    """:func:`smart_resize` with the image's name in the message: (height, width) in pixels."""
    try:
        return smart_resize(height, width, factor, min_pixels, max_pixels)
    except ImageError as error:
        raise ImageError(f"{name}: {error}", error.reason) from None


def decode(image: Image.Image, transparency: Transparency = "drop", name: str = "image") -> np.ndarray:
    """The pixels of an opened image.

    Args:
        image: from :func:`open_image`.
        transparency: see :func:`load_image`.
        name: name for messages.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ImageError: if the pixels cannot be decoded, for example because the file is truncated.
    """
    try:
        image.load()
    except Exception as error:  # see open_image
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise ImageError(f"{name}: the image cannot be decoded ({first_line(error)})", reason) from None
    if transparency == "contrast":
        image = _on_contrasting_background(image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def resize(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes by Pillow's bicubic filter, as the released model's code does.

    Args:
        pixels: [H, W, 3] uint8.
        size: height and width in pixels.

    Returns:
        [3, H, W] uint8.
    """
    height, width = size
    if pixels.shape[:2] == size:
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_fast(pixels: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Resizes by torch's bicubic filter for bytes: least time, and some values differ from Pillow's by 1 or 2 of 255.

    Args:
        pixels: [H, W, 3] uint8.
        size: height and width in pixels.

    Returns:
        [3, H, W] uint8.
    """
    if pixels.shape[:2] == size:
        return resize(pixels, size)
    planes = torch.from_numpy(np.require(pixels, requirements="W")).permute(2, 0, 1)
    return interpolate(planes[None], size, mode="bicubic", antialias=True)[0]


def to_pixels(
    image: Image.Image, size: tuple[int, int], transparency: Transparency = "drop", name: str = "image"
) -> Tensor:
    """Decodes, resizes and normalizes an opened image.

    Args:
        image: from :func:`open_image`.
        size: height and width in pixels.
        transparency: see :func:`load_image`.
        name: name for messages.

    Returns:
        [3, H, W] float32.

    Raises:
        ImageError: if the pixels cannot be decoded.
    """
    raw = resize(decode(image, transparency, name), size)
    return normalize(raw.flatten(1).float()).view(3, *size)


def load_image(
    source: ImageSource,
    factor: int = 32,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    transparency: Transparency = "drop",
    *,
    name: str | None = None,
    max_decoded_pixels: int = MAX_DECODED_PIXELS,
) -> Tensor:
    """An image as the model reads it.

    Args:
        source: path, the bytes of an image file, or a Pillow image.
        factor: side of one visual token in pixels, ``InputSpec.factor``.
        min_pixels: smallest area after resizing; a smaller image is scaled up.
        max_pixels: largest area after resizing.
        transparency: ``drop`` ignores an alpha channel, as in training; ``contrast`` puts an RGBA image that has fully
            transparent pixels on a white background, as the released model's inference does.
        name: name for messages; the path if ``None``.
        max_decoded_pixels: refuse an image that announces more pixels than this.

    Returns:
        [3, H, W] float32, ImageNet-normalized; sides are multiples of ``factor``.

    Raises:
        FileNotFoundError: if the path does not exist.
        ImageError: (a ``ValueError``) if the image is unreadable, truncated, empty, too large, or its aspect ratio is
            over 200; ``error.reason`` names it.
    """
    if transparency not in get_args(Transparency):
        raise ValueError(f"transparency must be one of {', '.join(get_args(Transparency))}, got {transparency!r}")
    image = open_image(source, name, max_decoded_pixels)
    name = name or (str(source) if isinstance(source, str | PathLike) else "image")
    size = image_size(image.height, image.width, factor, min_pixels, max_pixels, name)
    return to_pixels(image, size, transparency, name)


def _on_contrasting_background(image: Image.Image) -> Image.Image:
    """Fills transparent areas so that what is visible stands out.

    The released code takes black where the mean of the visible 8-bit channel values is above 382.5. No 8-bit mean is,
    so the background is always white; an image without any visible pixel is left alone.
    """
    if image.mode != "RGBA":
        return image
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] != 0 or alpha.getbbox() is None:  # no transparent pixel, or no other
        return image
    background = Image.new("RGB", image.size, (255, 255, 255))
    background.paste(image, mask=alpha)
    return background
