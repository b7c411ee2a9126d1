"""Renders SVG drawings with resvg (MPL-2.0, by resvg-py), and reads the titles and keywords in their RDF."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from neo_components.data.skip_counts import SampleError

MAX_CHARACTERS = 400_000
"""Longer drawings are refused: scanned maps and traced photographs, which take seconds each."""

MAX_RATIO = 4.0
"""Of the longer side to the shorter one; a rule of a hundred to one is no picture."""

_ROOT = re.compile(r"<(?:\w+:)?svg\b[^>]*>", re.DOTALL)
_ATTRIBUTE = re.compile(r"""\s(width|height|viewBox)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_LENGTH = re.compile(r"\s*\+?(\d+\.?\d*|\.\d+)\s*(px|pt|pc|mm|cm|in|em|ex)?\s*")
# Pixels of a unit at 96 dots per inch (CSS Values and Units 3, section 6.2) and of a 16 pixel font.
_PIXELS = {"px": 1.0, "pt": 96 / 72, "pc": 16.0, "mm": 96 / 25.4, "cm": 96 / 2.54, "in": 96.0, "em": 16.0, "ex": 8.0}
_HEAVY = re.compile(r"<(?:fe[A-Z]|image\b|pattern\b)")
MAX_HEAVY = 150
"""Filters, patterns and embedded photographs in a drawing; more of them take seconds to render."""


def render(svg: str, side: int, name: str = "drawing") -> Image.Image:
    """Renders a drawing.

    Text in it is left out, as fonts differ from machine to machine.

    Args:
        svg: the text of the file.
        side: longer side of the image in pixels; the ratio is kept.
        name: for messages.

    Returns:
        mode RGBA, not premultiplied.

    Raises:
        SampleError: (a ``ValueError``) if it cannot be rendered, is too large or too long and thin, or shows nothing.
    """
    return _opened(_png(svg, side, name), name)


class Renders:
    """Renders each drawing once, and keeps it in memory as a PNG file of about 10 kB: decoding is ten times faster.

    Args:
        side: longer side of what is kept, and of the largest image.
        most: number of drawings that are kept.
    """

    def __init__(self, side: int = 224, most: int = 8_000) -> None:
        self.side, self.most = side, most
        self._kept: dict[str, bytes] = {}

    def get(self, name: str, svg: Callable[[], str], side: int) -> Image.Image:
        """A drawing in another size.

        Args:
            name: by which it is kept, and for messages.
            svg: returns its text, if it is not kept.
            side: longer side in pixels, at most that of this object.

        Raises:
            SampleError: (a ``ValueError``) as :func:`render` does.
        """
        png = self._kept.get(name)
        if png is None:
            png = _png(svg(), self.side, name)
            if len(self._kept) < self.most:
                self._kept[name] = png
        image = _opened(png, name)
        if side >= self.side:
            return image
        width, height = (max(1, round(length * side / self.side)) for length in image.size)
        return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2.0)


def _opened(png: bytes, name: str) -> Image.Image:
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    if not any(image.getchannel("A").histogram()[128:]):
        raise SampleError(f"{name} shows nothing", "empty")
    return image


def _png(svg: str, side: int, name: str) -> bytes:
    if len(svg) > MAX_CHARACTERS or len(_HEAVY.findall(svg)) > MAX_HEAVY:
        raise SampleError(f"{name}: {len(svg)} characters of SVG, or its filters, take too long to render", "too_large")
    width, height = size(svg, name)
    if max(width, height) > MAX_RATIO * min(width, height):
        raise SampleError(
            f"{name}: a drawing of {width:g} to {height:g} is over the ratio {MAX_RATIO:g}", "aspect_ratio"
        )
    target = {"width": side} if width >= height else {"height": side}
    try:
        # Without dpi, lengths in points, millimeters and inches are zero.
        return bytes(_resvg().svg_to_bytes(svg_string=svg, dpi=96.0, skip_system_fonts=True, **target))
    except ValueError as error:
        raise SampleError(f"{name} cannot be rendered: {error}", "unreadable") from None


def size(svg: str, name: str = "drawing") -> tuple[float, float]:
    """Width and height of a drawing in pixels, of its ``viewBox`` where the root element gives none in units.

    Raises:
        SampleError: (a ``ValueError``) if it has neither.
    """
    root = _ROOT.search(svg)
    if root is None:
        raise SampleError(f"{name} is no SVG: it has no element svg", "unreadable")
    found = {key: one or other for key, one, other in _ATTRIBUTE.findall(root[0])}
    try:
        box = [float(value) for value in re.split(r"[\s,]+", found.get("viewBox", "").strip())]
    except ValueError:
        box = []
    sides = [_pixels(found.get("width", "")), _pixels(found.get("height", ""))]
    if len(box) == 4:
        given = [side / length for side, length in zip(sides, box[2:], strict=True) if side and length > 0]
        sides = [side or length * (given[0] if given else 1.0) for side, length in zip(sides, box[2:], strict=True)]
    if min(sides) <= 0:
        raise SampleError(f"{name} has no size: neither width and height nor a viewBox", "unreadable")
    return sides[0], sides[1]


def _pixels(length: str) -> float:
    """A length in pixels; 0 if it is missing or a percentage."""
    found = _LENGTH.fullmatch(length)
    return float(found[1]) * _PIXELS[found[2] or "px"] if found else 0.0


@cache
def _resvg() -> Any:
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise ModuleNotFoundError("drawings need resvg-py: pip install 'neo-components[pretrain]'") from None
    return resvg_py


@dataclass(frozen=True)
class Rdf:
    """What a drawing says about itself in the element ``cc:Work`` of its metadata.

    Args:
        title: as written; may be empty.
        keywords: as written, without empty ones.
        creator: name of the author; may be empty.
    """

    title: str
    keywords: tuple[str, ...]
    creator: str


def read_rdf(svg: str) -> Rdf:
    """Reads the first ``cc:Work``; what it lacks is empty."""
    start = svg.find("<cc:Work")
    work = svg[start : svg.find("</cc:Work>", start)] if start >= 0 else ""
    title = re.search(r"<dc:title>(.*?)</dc:title>", work, re.DOTALL)
    creator = re.search(r"<dc:creator>.*?<dc:title>(.*?)</dc:title>", work, re.DOTALL)
    keywords = (_plain(word) for word in re.findall(r"<rdf:li>(.*?)</rdf:li>", work, re.DOTALL))
    return Rdf(
        _plain(title[1]) if title else "",
        tuple(word for word in keywords if word),
        _plain(creator[1]) if creator else "",
    )


def _plain(text: str) -> str:
    return " ".join(html.unescape(text).split())


def read_svg(path: Path) -> str:
    """The text of a file; bytes that are no UTF-8 are read as Latin-1, as old drawing programs wrote them."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")
