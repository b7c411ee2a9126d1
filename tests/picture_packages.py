"""Stand-ins for the packages of fonts and words: DejaVu, which comes with matplotlib, and a few words."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from neo_components.data.pictures.fonts import NEEDS
from neo_components.data.pictures.words import LISTS, PACKAGE

FACES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Italic")
NOUNS = (
    "apple", "anchor", "basket", "bridge", "candle", "castle", "dragon", "engine", "fabric", "garden", "hammer",
    "island", "jacket", "kettle", "ladder", "magnet", "needle", "orange", "pencil", "quarry", "rocket", "saddle",
    "tunnel", "valley", "window", "yogurt", "zipper", "lamp", "moon", "nest", "oven", "path", "rain", "star", "tree",
)  # fmt: skip


def stand_ins(folder: Path) -> Path:
    """Makes a folder of packages, one font file for each family; returns it."""
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for number, name in enumerate(NEEDS):
        files = folder / name / name.replace("-", "_") / "files"
        files.mkdir(parents=True)
        (files / "Font.ttf").symlink_to(fonts / f"{FACES[number % len(FACES)]}.ttf")
    lists = folder / PACKAGE / PACKAGE / "assets"
    lists.mkdir(parents=True)
    texts = (NOUNS, ["carry", "drink", "float", "gather"], ["gentle", "narrow", "purple", "quiet"])
    for name, words in zip(LISTS, texts, strict=True):
        (lists / name).write_text("\n".join(words))
    (lists / "profanitylist.txt").write_text("needle\n")
    return folder
