"""What sources of typeset images share: fonts and words, which they draw from without end."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from neo_components.data.pictures import words
from neo_components.data.pictures.fonts import NEEDS, Fonts
from neo_components.data.pictures.picture import SPLITS, PictureSource
from neo_components.data.pictures.words import Words
from neo_components.errors import one_of


class TypesetSource(PictureSource):
    """Base class of sources that draw words of at most eight letters; held-out ones are set in held-out fonts."""

    license: ClassVar[str] = "OFL-1.1 AND Apache-2.0 AND MIT"
    needs: ClassVar[tuple[str, ...]] = (*NEEDS, words.PACKAGE)

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.fonts, self.words = Fonts(packages), Words(packages, longest=8)

    def items(self, split: str) -> None:
        """They are drawn without end."""
        one_of("split", split, SPLITS)
