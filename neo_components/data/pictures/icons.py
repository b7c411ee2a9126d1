"""Named icons: Noto emoji and Tabler icons; Fluent emoji, in three styles, are the set that is held out."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from neo_components.data.pictures.colors import main_color
from neo_components.data.pictures.held_out_pairs import held_out_colors, names_held_out, refuse_held_out
from neo_components.data.pictures.naming import Thing, ask, keeps_of
from neo_components.data.pictures.packages import package_folder
from neo_components.data.pictures.picture import HELD_OUT, SPLITS, TRAIN, Picture, PictureSource
from neo_components.data.pictures.svg import Renders, read_svg, render
from neo_components.errors import one_of
from neo_components.registry import PICTURES

NOTO, TABLER, FLUENT = "noto-emoji", "tabler-icons", "fluent-emoji"
SIDES = (64, 192)
"""Smallest and largest side of an icon in pixels."""

_SKIN = re.compile(r"(^|-)(medium-)?(light|dark|medium)-skin-tone")
_MOST_WORDS = 4
_KINDS = {
    "Activities": "activity", "Animals & Nature": "nature", "Flags": "flag", "Food & Drink": "food or drink",
    "Objects": "object", "People & Body": "person", "Smileys & Emotion": "face", "Symbols": "symbol",
    "Travel & Places": "travel",
}  # fmt: skip
_LEFT_OUT_OF_TABLER = re.compile(
    r"^(brand|circle-(letter|number|dashed)|square-(letter|number|rounded|dashed)|hexagon|code-circle|zodiac)|-off$|\d|^letter-.*-|-(up|down)-(left|right)"
)
_TABLER_KINDS = {
    "Animals": "animal", "Arrows": "arrow", "Buildings": "building", "Charts": "chart", "Currencies": "currency",
    "Devices": "device", "Document": "document", "Food": "food or drink", "Games": "game", "Gender": "gender",
    "Gestures": "gesture", "Health": "health", "Letters": "letter", "Map": "map", "Math": "math", "Media": "media",
    "Mood": "face", "Nature": "nature", "Numbers": "number", "Shapes": "shape", "Sport": "sport", "Vehicles": "vehicle",
    "Weather": "weather", "Zodiac": "zodiac sign", "Text": "text", "Computers": "computing",
}  # fmt: skip
_INKS = (
    ("black", "#111111"), ("black", "#000000"), ("red", "#d42020"), ("blue", "#2346c8"), ("green", "#1f8a3a"),
    ("orange", "#f08010"), ("purple", "#7a28a8"), ("brown", "#7a4a1e"), ("gray", "#777777"), ("pink", "#ea4c9a"),
    ("white", "#ffffff"), ("yellow", "#f2cf10"),
)  # fmt: skip


@dataclass(frozen=True)
class Icon:
    """One icon.

    Args:
        thing: what it shows.
        file: its file; of a set in one JSON file, the name in there.
        kind: ``noto``, ``tabler`` or ``fluent``.
    """

    thing: Thing
    file: str
    kind: str


class IconSets:
    """The icons of both splits, in a fixed order without meaning.

    Raises:
        FileNotFoundError: if a package is missing.
    """

    def __init__(self, packages: Path) -> None:
        self._renders = Renders()
        noto = package_folder(packages, NOTO)
        self.noto: dict[str, Any] = json.loads((noto / "icons.json").read_text(encoding="utf-8"))
        categories = json.loads((noto / "metadata.json").read_text(encoding="utf-8"))["categories"]
        self.tabler, self.fluent = package_folder(packages, TABLER), package_folder(packages, FLUENT)
        emoji = {
            name: kind for category, names in categories.items() for name in names if (kind := _KINDS.get(category))
        }
        emoji = {name: kind for name, kind in emoji.items() if not _SKIN.search(name)}
        self.icons = {
            TRAIN: _shuffled(i for i in (*self._noto(emoji), *self._tabler()) if not names_held_out(i.thing.name)),
            HELD_OUT: _shuffled(self._fluent(emoji)),
        }

    def _noto(self, emoji: dict[str, str]) -> Iterable[Icon]:
        for name, kind in emoji.items():
            if name in self.noto["icons"] and (readable := readable_name(name)):
                yield Icon(Thing(readable, (kind,), "emoji"), name, "noto")

    def _tabler(self) -> Iterable[Icon]:
        facts = json.loads((self.tabler / "icons.json").read_text(encoding="utf-8"))
        for name, fact in facts.items():
            if _LEFT_OUT_OF_TABLER.search(name) or not (readable := readable_name(name)):
                continue
            kinds = (_TABLER_KINDS[fact["category"]],) if fact["category"] in _TABLER_KINDS else ()
            for style in fact["styles"]:
                yield Icon(Thing(readable, kinds, "icon"), f"icons/{style}/{name}.svg", "tabler")

    def _fluent(self, emoji: dict[str, str]) -> Iterable[Icon]:
        """Those that the set of the train split has too, so that their names can be known."""
        for path in sorted((self.fluent / "icons").rglob("*.svg")):
            if path.stem in emoji and (readable := readable_name(path.stem)):
                thing = Thing(readable, (emoji[path.stem],), "emoji")
                yield Icon(thing, path.relative_to(self.fluent).as_posix(), "fluent")

    def render(self, icon: Icon, side: int, rng: random.Random) -> tuple[Image.Image, str | None]:
        """An icon and its main color if it has one; line icons get an ink and a thickness.

        No icon of the train split shows a held-out pair of color and shape.

        Args:
            icon: of this set.
            side: of the image in pixels.
            rng: of ink and thickness.

        Raises:
            SampleError: (a ``ValueError``) if it cannot be rendered, or if an icon of the train split shows a
                held-out pair.
        """
        if icon.kind == "tabler":
            color, ink = rng.choice(inks(icon.thing.name))
            svg = read_svg(self.tabler / icon.file).replace("currentColor", ink)
            svg = svg.replace('stroke-width="2"', f'stroke-width="{rng.choice((1, 1.5, 2, 2, 2.5, 3))}"')
            return render(svg, side, icon.file), color
        if icon.kind == "noto":
            image = self._renders.get(icon.file, lambda: self._noto_svg(icon.file), side)
            refuse_held_out(icon.thing.name, image)
        else:
            image = render(read_svg(self.fluent / icon.file), side, icon.file)
        return image, main_color(image)

    def _noto_svg(self, name: str) -> str:
        drawn = self.noto["icons"][name]
        box = [drawn.get(key, self.noto.get(key, default)) for key, default in _BOX.items()]
        return _SVG.format(*box, drawn["body"])


_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}  # defaults of IconifyJSON
_SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'viewBox="{0} {1} {2} {3}">{4}</svg>'
)


def inks(name: str) -> list[tuple[str, str]]:
    """Names and values of the colors that a line icon may be drawn in."""
    return [ink for ink in _INKS if ink[0] not in held_out_colors(name)]


def readable_name(name: str) -> str:
    """``crescent-moon`` -> ``crescent moon``; empty if it is too long to be a name."""
    words = name.replace("-", " ").split()
    return " ".join(words) if len(words) <= _MOST_WORDS else ""


def _shuffled(icons: Iterable[Icon]) -> list[Icon]:
    return sorted(icons, key=lambda icon: hashlib.sha256(f"{icon.kind} {icon.file}".encode()).hexdigest())


_SETS: dict[Path, IconSets] = {}


def icon_sets(packages: Path) -> IconSets:
    """The icons of a folder of packages, read once for all sources that use them."""
    key = packages.resolve()
    if key not in _SETS:
        _SETS[key] = IconSets(packages)
    return _SETS[key]


@PICTURES.register("icons")
class Icons(PictureSource):
    """One icon or emoji, with questions on name, kind and color."""

    license = "Apache-2.0 AND MIT"
    origin = "Noto emoji, Tabler icons; held out: Fluent emoji"
    needs = (NOTO, TABLER, FLUENT)

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.sets = icon_sets(packages)

    def items(self, split: str) -> int:
        """Number of icons."""
        one_of("split", split, SPLITS)
        return len(self.sets.icons[split])

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """See :meth:`PictureSource.draw`."""
        icons = self.sets.icons[split]
        icon = icons[number % len(icons)]
        image, color = self.sets.render(icon, rng.randint(*SIDES), rng)
        others = [other.thing for other in rng.sample(icons, min(12, len(icons)))]
        turns, kind = ask(icon.thing, others, rng, color)
        keeps = keeps_of(icon.thing.name, icon.thing.kinds, turns)
        return Picture(image, tuple(turns), kind, frozenset(keeps))
