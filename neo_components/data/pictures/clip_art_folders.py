"""What the folders of Open Clip Art say about the drawings in them."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

KINDS: dict[str, tuple[str, ...]] = {
    "animals": ("animal",),
    "animals/amphibian": ("amphibian", "animal"),
    "animals/birds": ("bird", "animal"),
    "animals/birds/penguin": ("penguin", "bird", "animal"),
    "animals/bugs": ("insect", "animal"),
    "animals/dinosaurs": ("dinosaur", "animal"),
    "animals/fantasy": ("fantasy animal", "animal"),
    "animals/fish": ("fish", "animal"),
    "animals/mammals": ("mammal", "animal"),
    "animals/mammals/bears": ("bear", "mammal", "animal"),
    "animals/mammals/big_cats": ("big cat", "mammal", "animal"),
    "animals/mammals/dogs": ("dog", "mammal", "animal"),
    "animals/mammals/horses": ("horse", "mammal", "animal"),
    "animals/mammals/housecats": ("cat", "mammal", "animal"),
    "buildings": ("building",),
    "buildings/furniture": ("furniture",),
    "buildings/homes": ("house", "building"),
    "buttons": ("button",),
    "computer": ("computing",),
    "computer/buttons": ("button", "computing"),
    "computer/connectors": ("connector", "computing"),
    "computer/diagrams": ("diagram",),
    "computer/folders": ("folder", "computing"),
    "computer/hardware": ("hardware", "computing"),
    "computer/icons": ("computer icon",),
    "containers": ("container",),
    "decorations": ("decoration",),
    "education": ("education",),
    "education/books": ("book", "education"),
    "electronics": ("electronics",),
    "electronics/battery": ("battery", "electronics"),
    "electronics/bulb": ("light bulb", "electronics"),
    "food": ("food",),
    "food/beverages": ("drink",),
    "food/beverages/alcohol": ("drink with alcohol", "drink"),
    "food/breads_and_carbs": ("bread", "food"),
    "food/dairy": ("dairy", "food"),
    "food/desserts": ("dessert", "food"),
    "food/fruit": ("fruit", "food"),
    "food/meats_and_eggs": ("meat", "food"),
    "food/vegetables": ("vegetable", "food"),
    "geography": ("map",),
    "geography/astronomy": ("astronomy",),
    "logos": ("logo",),
    "office": ("office supply",),
    "office/telephone": ("telephone", "office supply"),
    "people": ("person",),
    "people/bodypart": ("body part",),
    "people/clothing": ("clothing",),
    "people/clothing/hats": ("hat", "clothing"),
    "people/clothing/jewelry": ("jewelry", "clothing"),
    "people/clothing/pantyhose": ("clothing",),
    "people/smilies": ("smiley face",),
    "people/stickmen": ("stick figure", "person"),
    "plants": ("plant",),
    "plants/flowers": ("flower", "plant"),
    "plants/trees": ("tree", "plant"),
    "recreation": ("recreation",),
    "recreation/games": ("game",),
    "recreation/games/cards": ("playing card", "game"),
    "recreation/games/chess": ("chess", "game"),
    "recreation/games/dice": ("die", "game"),
    "recreation/holiday": ("holiday",),
    "recreation/holiday/christmas": ("christmas", "holiday"),
    "recreation/holiday/valentines": ("valentine", "holiday"),
    "recreation/music": ("music",),
    "recreation/party": ("party",),
    "recreation/religion": ("religion",),
    "recreation/sports": ("sport",),
    "recreation/toys": ("toy",),
    "science": ("science",),
    "science/astronomy": ("astronomy", "science"),
    "science/medicine": ("medicine", "science"),
    "shapes": ("shape",),
    "shapes/arrows": ("arrow", "shape"),
    "shapes/callouts": ("speech bubble", "shape"),
    "shapes/flowchart": ("flowchart symbol", "shape"),
    "shapes/jigsaw": ("puzzle piece", "shape"),
    "shapes/stars": ("star", "shape"),
    "signs_and_symbols": ("sign or symbol",),
    "signs_and_symbols/clocks": ("clock",),
    "signs_and_symbols/flags": ("flag",),
    "signs_and_symbols/flags/semaphore": ("semaphore signal",),
    "signs_and_symbols/hazard": ("warning sign", "sign"),
    "signs_and_symbols/led": ("light", "electronics"),
    "signs_and_symbols/map_symbols": ("map symbol", "sign"),
    "signs_and_symbols/money": ("money",),
    "signs_and_symbols/weather": ("weather",),
    "special/gradients": ("color gradient",),
    "special/patterns": ("pattern",),
    "tools": ("tool",),
    "tools/weapons": ("weapon", "tool"),
    "transportation": ("transport",),
    "transportation/aiga-symbols": ("sign",),
    "transportation/boating": ("boat", "transport"),
    "transportation/roadsigns": ("road sign", "sign"),
    "transportation/vehicles": ("vehicle", "transport"),
    "transportation/vehicles/hummers": ("car", "vehicle", "transport"),
}
"""Kinds of what a folder holds, the finest first; a folder that is not here has those of the one above it."""

LEFT_OUT = ("special/examples", "computer/icons/etiquette-theme/stock/generic")
"""Pages of text."""

LIMITS = {
    "shapes/stars": 60,
    "shapes/jigsaw": 20,
    "special/gradients": 60,
    "special/patterns": 70,
    "signs_and_symbols/led": 25,
    "shapes/arrows": 80,
    "transportation/vehicles/hummers": 4,
}
"""Most drawings of folders whose drawings differ in a number or a color."""

_SUITS = {"h": "hearts", "d": "diamonds", "c": "clubs", "s": "spades"}
_RANKS = {
    "a": "ace", "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight",
    "9": "nine", "10": "ten", "j": "jack", "q": "queen", "k": "king",
}  # fmt: skip
_CARD = re.compile(r"(?:white|simple|ornamental|bordered)_([hdcs])_(\w+)")
_NAMED_BY_KIND = ("shapes/stars", "shapes/jigsaw", "shapes/callouts", "people/stickmen", "shapes/flowchart")


def kinds_of(path: str) -> tuple[str, ...]:
    """Kinds of a drawing by its folder; empty for folders without meaning."""
    for folder in PurePosixPath(path).parents:
        if str(folder) in KINDS:
            return KINDS[str(folder)]
    return ()


def name_in_folder(path: str, title: str, same_title: int) -> str | None:
    """The name of a drawing in a folder whose files are named by a rule of its own; ``None`` for all others.

    Args:
        path: of the file.
        title: of the drawing.
        same_title: number of drawings with this title.
    """
    stem = PurePosixPath(path).stem
    if path.startswith("recreation/games/cards") and (card := _CARD.fullmatch(stem)):
        return f"{_RANKS[card[2]]} of {_SUITS[card[1]]}" if card[2] in _RANKS else "playing card"
    if path.startswith("signs_and_symbols/flags/semaphore"):
        letter = stem.rpartition("_")[2]
        return f"semaphore {letter}" if stem.startswith("semaphore_") else ""
    if path.startswith("signs_and_symbols/flags"):
        if signal := re.fullmatch(r"signalflag_([a-z]+|\d)", stem):
            return f"signal flag {signal[1]}"
        return _flag(title if same_title < 3 and not _COLLECTION.search(title) else stem)
    if path.startswith("geography/") and not path.startswith("geography/astronomy"):
        place = _place(title)
        return f"map of {place}" if same_title < 3 and place and not _COLLECTION.search(title) else "map"
    if path.startswith(_NAMED_BY_KIND):
        return kinds_of(path)[0]
    return None


_COLLECTION = re.compile(r"clip ?art|collection|flags of|signal", re.IGNORECASE)
_REGIONS = re.compile(r"^(usa|uk|canada|spain|france|italy|germany|australia|china|norway|finland|denmark|belgium)_")
_NO_PLACE = {
    "clipart", "flag", "flags", "of", "the", "banner", "bandiera", "map", "mapa", "outline", "shaded", "white",
    "flagge", "signalflag", "creation",
    "historic", "usa", "state", "world", "blank", "region", "regions", "europe", "illustration", "bandera", "icon",
}  # fmt: skip


def _flag(title: str) -> str:
    """``United Kingdom - Wales`` -> ``flag of Wales``, ``usa_new_york`` -> ``flag of New York``."""
    place = _place(_REGIONS.sub("", title))
    return f"flag of {place}" if place else "flag"


def _place(title: str) -> str:
    """The name of a place, with capital letters; empty if the title is none."""
    last = re.split(r"\s-\s?|\s-(?=[A-Z])|:", title)[-1]
    words = [w for w in re.findall(r"[^\W\d_]+(?:['.][^\W\d_]+)?", last) if w.lower() not in _NO_PLACE]
    if not words or len(words) > 4 or max(map(len, words)) < 3:
        return ""
    small = {"and", "of", "the", "de", "la"}
    return " ".join(w if w.lower() in small else w[0].upper() + w[1:] for w in words)
