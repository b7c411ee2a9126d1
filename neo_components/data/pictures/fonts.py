"""Font families for drawn text, from the PyPI packages ``fontpkg-*``, and which of them training never shows.

Each package holds one family of Google Fonts as its designers released it, under OFL-1.1 (most) or Apache-2.0. Versions
and checksums are in ``font_packages.tsv``.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont

from neo_components.data.pictures.packages import PACKAGES, missing, package_folder
from neo_components.data.pictures.picture import HELD_OUT, SPLITS
from neo_components.errors import one_of

PREFIX = "fontpkg-"
FAMILIES: dict[str, tuple[str, ...]] = {
    "serif": (
        "eb-garamond", "merriweather", "lora", "playfair-display", "libre-baskerville", "crimson-text", "noto-serif",
        "pt-serif", "bodoni-moda", "cormorant-garamond", "spectral", "cardo", "dm-serif-display", "vollkorn", "cinzel",
        "fraunces",
    ),
    "sans": (
        "roboto", "open-sans", "lato", "montserrat", "noto-sans", "inter", "oswald", "raleway", "fira-sans",
        "josefin-sans", "nunito", "barlow-condensed", "exo-2", "titillium-web", "archivo-narrow", "quicksand",
        "rajdhani", "ibm-plex-sans", "bebas-neue", "comfortaa", "poppins", "yanone-kaffeesatz",
    ),
    "slab": ("roboto-slab", "arvo", "zilla-slab", "alfa-slab-one", "antic-slab", "sanchez", "bitter"),
    "mono": (
        "roboto-mono", "jetbrains-mono", "fira-code", "ibm-plex-mono", "inconsolata", "space-mono", "source-code-pro",
        "dm-mono",
    ),
    "hand": (
        "caveat", "dancing-script", "indie-flower", "kalam", "pacifico", "permanent-marker", "satisfy",
        "shadows-into-light", "yellowtail", "zeyada", "great-vibes", "delius", "lobster", "lobster-two", "oleo-script",
    ),
    "display": (
        "press-start-2p", "bungee", "black-ops-one", "righteous", "orbitron", "luckiest-guy", "titan-one",
        "abril-fatface", "russo-one", "fredoka", "gravitas-one", "lilita-one", "unbounded", "baloo-2", "changa-one",
        "rowdies", "teko",
    ),
}  # fmt: skip
"""Names of the packages without their prefix, by kind of font."""

NEVER_IN_TRAINING = frozenset({
    "libre-baskerville", "bodoni-moda", "josefin-sans", "barlow-condensed", "exo-2", "arvo", "space-mono", "kalam",
    "yellowtail", "righteous", "bungee",
})  # fmt: skip
"""The families of the held-out split: 11 of 85, of every kind."""

CAPITALS_ONLY = frozenset({"bebas-neue", "bungee", "luckiest-guy", "cinzel", "permanent-marker"})
"""Families whose small letters are capitals, too."""

PLAIN_KINDS = ("serif", "sans", "slab", "mono")
"""What charts, tables and documents are set in."""

HAIRLINES = ("Thin", "ExtraLight", "Hairline")
"""Weights left out: at the sizes of these pictures their strokes are under half a pixel wide."""
WEIGHTS = (300, 400, 500, 700, 900)
NEEDS = tuple(PREFIX + name for names in FAMILIES.values() for name in names)
"""Names of all packages."""


@dataclass(frozen=True)
class Face:
    """One font of a family.

    Args:
        family: name of the package without its prefix.
        kind: of :data:`FAMILIES`.
        path: the font file.
        axes: value of each axis of a variable font.
    """

    family: str
    kind: str
    path: str
    axes: tuple[float, ...] = ()

    @property
    def has_small_letters(self) -> bool:
        """Whether small letters and capitals look different."""
        return self.family not in CAPITALS_ONLY

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels; large sizes are rounded, so that the fonts kept in memory are few."""
        return _load(self.path, self.axes, size if size < 24 else size // 2 * 2 if size < 64 else size // 4 * 4)


@functools.lru_cache(maxsize=512)
def _load(path: str, axes: tuple[float, ...], size: int) -> ImageFont.FreeTypeFont:
    # The basic layout draws Latin letters as the elaborate one does, several times as fast.
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    if axes:
        font.set_variation_by_axes(list(axes))
    return font


class Fonts:
    """The families of unpacked packages.

    Args:
        packages: folder with one folder for each package, by its name.

    Raises:
        FileNotFoundError: if a package is not there or holds no font.
    """

    def __init__(self, packages: Path) -> None:
        self._files = {}
        self._kinds = {name: kind for kind, names in FAMILIES.items() for name in names}
        for name in self._kinds:
            folder = package_folder(packages, PREFIX + name)
            files = sorted(str(path) for path in folder.rglob("*") if path.suffix in (".ttf", ".otf"))
            found = [file for file in files if not any(weight in Path(file).name for weight in HAIRLINES)]
            if not found:
                raise FileNotFoundError(
                    f"{folder} holds no font; remove it. Then {missing(packages, PACKAGES[PREFIX + name])}"
                )
            self._files[name] = found
        self._faces: dict[str, list[Face]] = {}

    def families(self, split: str, kinds: Sequence[str] = tuple(FAMILIES)) -> list[str]:
        """Names of the families of a split.

        Raises:
            ValueError: for an unknown split.
        """
        one_of("split", split, SPLITS)
        held_out = split == HELD_OUT
        return [name for kind in kinds for name in FAMILIES[kind] if (name in NEVER_IN_TRAINING) == held_out]

    def faces(self, family: str) -> list[Face]:
        """All fonts of a family: its files, of variable fonts at several weights."""
        if family not in self._faces:
            kind = self._kinds[family]
            self._faces[family] = [
                Face(family, kind, path, axes) for path in self._files[family] for axes in _variations(path)
            ]
        return self._faces[family]

    def pick(self, rng: random.Random, split: str) -> Face:
        """A random font of a random family."""
        return rng.choice(self.faces(rng.choice(self.families(split))))

    def pick_plain(self, rng: random.Random, split: str) -> Face:
        """A random font for charts, tables and documents: plain, and with small letters that are no capitals."""
        families = [name for name in self.families(split, PLAIN_KINDS) if name not in CAPITALS_ONLY]
        return rng.choice(self.faces(rng.choice(families)))


def _variations(path: str) -> list[tuple[float, ...]]:
    """Values of the axes of a variable font at each weight that it has; one empty value for other fonts."""
    font = ImageFont.truetype(path, 20)
    try:
        axes = font.get_variation_axes()
    except OSError:  # as Pillow says that a font is not variable
        return [()]
    found = []
    for weight in WEIGHTS:
        values = []
        for axis in axes:
            least, most, usual = axis["minimum"] or 0, axis["maximum"] or 0, axis["default"] or 0
            values.append(float(min(most, max(least, weight))) if axis["name"] == b"Weight" else float(usual))
        if tuple(values) not in found:
            found.append(tuple(values))
    return found
