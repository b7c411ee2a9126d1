"""Opens image files and checks their headers; no pixel is decoded and torch is not needed."""

from __future__ import annotations

import io
from os import PathLike, fspath
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from neo_components.data.skip_counts import SampleError

MAX_DECODED_PIXELS = 2**27
ImageSource = str | PathLike[str] | bytes | Image.Image


class ImageError(SampleError):
    """An image that cannot be used.

    Args:
        message: what is wrong, with the image's name.
        reason: one word for counting: ``unreadable``, ``empty``, ``truncated``, ``too_large`` or ``aspect_ratio``.
    """

    def __init__(self, message: str, reason: str = "unreadable") -> None:
        super().__init__(message, reason)


def open_image(
    source: ImageSource, name: str | None = None, max_decoded_pixels: int = MAX_DECODED_PIXELS
) -> Image.Image:
    """Opens an image and checks what its header says; no pixel is decoded yet.

    Args:
        source: path, the bytes of an image file, or a Pillow image.
        name: name for messages; the path if ``None``.
        max_decoded_pixels: an image whose header announces more pixels is refused before it is decoded
            (decompression bomb).

    Raises:
        FileNotFoundError: if the path does not exist.
        ImageError: if it is empty, no image, or too large.
    """
    if isinstance(source, Image.Image):
        image, name = source, name or getattr(source, "filename", "") or "image"
    else:
        data, name = _read(source, name)
        if not data:
            raise ImageError(f"{name}: the file is empty (0 bytes)", "empty")
        image = _open_header(data, name)
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: image of {width}x{height} pixels is empty", "empty")
    if width * height > max_decoded_pixels:
        raise ImageError(f"{name}: {width}x{height} pixels are over the limit of {max_decoded_pixels}", "too_large")
    return image


def _read(source: str | PathLike[str] | bytes, name: str | None) -> tuple[bytes, str]:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), name or f"image of {len(source)} bytes"
    if not isinstance(source, str | PathLike):
        raise TypeError(f"an image is a path, bytes or a Pillow image, got {type(source).__name__}")
    if not Path(source).is_file():
        raise FileNotFoundError(f"no such image file: {fspath(source)}")
    return Path(source).read_bytes(), name or fspath(source)


def _open_header(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(f"{name}: {error}", "too_large") from None
    except UnidentifiedImageError:  # its message names nothing but an object in memory
        raise ImageError(f"{name}: not a readable image (no known image format)") from None
    except Exception as error:  # Pillow's readers raise anything from SyntaxError to struct.error on broken headers
        raise ImageError(f"{name}: not a readable image ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """The first line of a library's message."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
