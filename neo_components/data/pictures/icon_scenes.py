"""Several icons on one canvas, with questions on where they are, how many, which is larger, and of what color.

These make visual tokens local: an answer depends on one part of the picture, or on two.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from neo_components.data.pictures.backgrounds import background
from neo_components.data.pictures.grid_questions import Placed, ask_about, place_of
from neo_components.data.pictures.icons import FLUENT, NOTO, TABLER, Icon, icon_sets
from neo_components.data.pictures.naming import Thing, different, keeps_of
from neo_components.data.pictures.picture import DETAIL, FRAME, MIRROR, SPLITS, TURN, Picture, PictureSource
from neo_components.errors import one_of
from neo_components.registry import PICTURES

CANVAS = (144, 240)
"""Smallest and largest longer side of the canvas in pixels."""

_GRIDS = ((2, 1), (1, 2), (2, 2), (2, 2), (3, 1), (1, 3), (3, 2), (2, 3), (3, 3))
"""Columns and rows."""
_MOST_ICONS = 5
_LONGEST_NAME = 20


@PICTURES.register("icon_scenes")
class IconScenes(PictureSource):
    """Two to five emoji in the cells of a grid, some of them the same; the held-out ones are of the held-out set."""

    license = "Apache-2.0 AND MIT"
    origin = "Noto emoji; held out: Fluent emoji"
    needs = (NOTO, TABLER, FLUENT)

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.sets = icon_sets(packages)
        self.icons = {
            split: [icon for icon in icons if icon.thing.style == "emoji" and len(icon.thing.name) <= _LONGEST_NAME]
            for split, icons in self.sets.icons.items()
        }

    def items(self, split: str) -> None:
        """Scenes have no end."""
        one_of("split", split, SPLITS)

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """See :meth:`PictureSource.draw`."""
        one_of("split", split, SPLITS)
        grid = columns, rows = rng.choice(_GRIDS)
        cells = [(column, row) for row in range(rows) for column in range(columns)]
        chosen = rng.sample(cells, rng.randint(2, min(len(cells), _MOST_ICONS)))
        icons = self._pick(len(chosen), split, rng)
        if len(chosen) > 2 and rng.random() < 0.35:  # several of the same, to be counted
            same = rng.randint(2, len(chosen))
            icons[:same] = icons[:1] * same
        image, placed = self._compose(grid, chosen, icons, rng)
        absent = next((icon.thing for icon in self._pick(4, split, rng) if _absent(icon.thing, placed)), None)
        turns, kind = ask_about(placed, absent, rng)
        names, kinds = " ".join(one.thing.name for one in placed), [kind for one in placed for kind in one.thing.kinds]
        keeps = {FRAME, MIRROR, TURN, DETAIL} | keeps_of(names, kinds, turns)
        return Picture(image, tuple(turns), kind, frozenset(keeps))

    def _pick(self, count: int, split: str, rng: random.Random) -> list[Icon]:
        """Icons whose names have no word in common."""
        picked: list[Icon] = []
        while len(picked) < count:
            icon = rng.choice(self.icons[split])
            if all(different(icon.thing, other.thing) for other in picked):
                picked.append(icon)
        return picked

    def _compose(
        self, grid: tuple[int, int], cells: Sequence[tuple[int, int]], icons: Sequence[Icon], rng: random.Random
    ) -> tuple[Image.Image, list[Placed]]:
        cell = rng.randint(*CANVAS) // max(grid)
        size = (cell * grid[0], cell * grid[1])
        layer = Image.new("RGBA", size)
        placed = []
        for (column, row), icon in zip(cells, icons, strict=True):
            side = round(cell * rng.uniform(0.5, 0.98))
            drawn, color = self.sets.render(icon, side, rng)
            at = (
                column * cell + rng.randint(0, max(cell - drawn.width, 0)),
                row * cell + rng.randint(0, max(cell - drawn.height, 0)),
            )
            layer.paste(drawn, at, drawn)
            placed.append(Placed(icon.thing, column, row, place_of(column, row, grid), side, color))
        canvas = background(size, layer, rng, plain=rng.random() < 0.5)
        canvas.paste(layer, (0, 0), layer)
        return canvas, placed


def _absent(thing: Thing, placed: Sequence[Placed]) -> bool:
    return all(different(thing, one.thing) and different(one.thing, thing) for one in placed)
