"""Decoding as fast as it goes: JPEG by torchvision, which gives the same pixels in less time, all else by Pillow."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from neo_components.data.image import images


def decode(image: Image.Image, name: str = "image") -> np.ndarray:
    """The pixels of an opened image, the same as those of :func:`neo_components.data.image.images.decode`.

    Args:
        image: from ``open_image``.
        name: name for messages.

    Returns:
        [H, W, 3] uint8.

    Raises:
        ImageError: if the pixels cannot be decoded, for example because the file is truncated.
    """
    pixels = _decode_jpeg(image)
    return images.decode(image, name=name) if pixels is None else pixels


def _decode_jpeg(image: Image.Image) -> np.ndarray | None:
    """The pixels of a JPEG file by torchvision, which is faster and gives the same; ``None`` leaves it to Pillow.

    Pillow also reports what is wrong with a file that cannot be decoded.
    """
    file = getattr(image, "fp", None)
    if image.format != "JPEG" or image.mode != "RGB" or not isinstance(file, io.BytesIO):
        return None
    decoder = _jpeg_decoder()
    try:
        return decoder(file) if decoder is not None else None
    except RuntimeError:
        return None


@lru_cache
def _jpeg_decoder() -> Callable[[io.BytesIO], np.ndarray] | None:
    """torchvision's decoder, as long as it has one: its successor, torchcodec, is not needed for anything else here."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:
        return None

    def decoded(file: io.BytesIO) -> np.ndarray:
        data = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
        pixels: np.ndarray = decode_jpeg(data, ImageReadMode.RGB).permute(1, 2, 0).numpy()
        return pixels

    return decoded
