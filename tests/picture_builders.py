"""Made-up packages of drawings, icons and words, as small as the sources of pictures can work with."""

from __future__ import annotations

import json
from pathlib import Path

from neo_components.data.pictures.packages import COMPLETE, PACKAGES

FEW = ("clip_art", "icons", "icon_scenes")
"""The sources that these packages suffice for."""

NAMES = (
    "dog",
    "cat",
    "cow",
    "horse",
    "apple",
    "pear",
    "plum",
    "lemon",
    "house",
    "tower",
    "chair",
    "table",
    "ship",
    "car",
)
NAMES += (
    "train",
    "rocket",
    "drum",
    "flute",
    "hammer",
    "saw",
    "cup",
    "plate",
    "fork",
    "spoon",
    "hat",
    "shoe",
    "ring",
    "key",
)
XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:cc="cc" xmlns:dc="dc" xmlns:rdf="rdf"'
COLORS = ("red", "blue", "green", "yellow")


def svg(color: str = "red", attributes: str = 'width="40" height="30"', rdf: str = "") -> str:
    """A rectangle that fills three quarters of its drawing, from the left."""
    return f'<svg {XMLNS} {attributes}>{rdf}<rect width="75%" height="100%" fill="{color}"/></svg>'


def rdf(title: str, *keywords: str, creator: str = "Ann") -> str:
    """Metadata as Open Clip Art has them."""
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f"<metadata><cc:Work><dc:title>{title}</dc:title><dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject>"
        f"<dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator></cc:Work></metadata>"
    )


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def make_packages(folder: Path) -> Path:
    """The folder of packages that ``prepare`` would leave."""
    for number, name in enumerate(NAMES):
        color = COLORS[number % 4]
        for kind in ("food", "tools"):
            path = folder / "openclipart-svg" / kind / f"{name}_{kind}_ann_0{number % 9}.svg"
            write(
                path,
                svg(color, f'width="40" height="{20 + number + (kind == "food") / 2}"', rdf(f"{name} {kind}", kind)),
            )
        write(folder / "fluent-emoji" / "icons" / "flat" / f"{name}.svg", svg(color, 'viewBox="0 0 32 32"'))
        line = (
            f'<svg {XMLNS} viewBox="0 0 24 24" stroke="currentColor" stroke-width="2"><path d="M2 {number}h9"/></svg>'
        )
        write(folder / "tabler-icons" / "icons" / "outline" / f"{name}.svg", line)
    bodies = {
        name: {"body": f'<rect width="128" height="128" fill="{COLORS[n % 4]}"/>'} for n, name in enumerate(NAMES)
    }
    write(folder / "noto-emoji" / "icons.json", json.dumps({"icons": bodies, "width": 128, "height": 128}))
    categories = {"Objects": NAMES[:14], "Food & Drink": NAMES[14:]}
    write(folder / "noto-emoji" / "metadata.json", json.dumps({"categories": categories}))
    lines = {name: {"category": "Map", "styles": {"outline": {}}} for name in NAMES}
    write(folder / "tabler-icons" / "icons.json", json.dumps(lines))
    for words in ("nounlist", "verblist", "adjectivelist", "profanitylist"):
        write(folder / "wonderwords" / "wonderwords" / "assets" / f"{words}.txt", "\n".join((*NAMES, "tools", "food")))
    write(folder / "wonderwords" / "wonderwords" / "assets" / "profanitylist.txt", "rude")
    for name in ("openclipart-svg", "noto-emoji", "tabler-icons", "fluent-emoji", "wonderwords"):
        write(folder / name / COMPLETE, json.dumps({"sha256": PACKAGES[name].sha256}))
    return folder
