"""Open Clip Art: 8,121 drawings in the public domain, named by their titles, keywords, files and folders.

Titles were written by hundreds of authors: some name the collection or the first drawing of a series, some are in other
languages. A name is used if its words are English or used by a second author. Folders are reliable, and give the kind
of every drawing.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from neo_components.data.pictures.clip_art_folders import LEFT_OUT, LIMITS, kinds_of, name_in_folder
from neo_components.data.pictures.colors import main_color
from neo_components.data.pictures.held_out_pairs import names_held_out, refuse_held_out
from neo_components.data.pictures.naming import Thing, ask, keeps_of
from neo_components.data.pictures.packages import package_folder
from neo_components.data.pictures.picture import HELD_OUT, SPLITS, TRAIN, Picture, PictureSource
from neo_components.data.pictures.svg import Rdf, Renders, read_rdf, read_svg
from neo_components.data.pictures.words import PACKAGE as WORDS
from neo_components.data.pictures.words import Words
from neo_components.errors import one_of
from neo_components.registry import PICTURES

PACKAGE = "openclipart-svg"
HELD_OUT_ONE_IN = 20
SIDES = (96, 224)
"""Smallest and largest longer side of a drawing in pixels."""

_GENERIC = re.compile(
    r"clip ?art|collection|\bicons\b|lemon svg|flat icon|aiga|road signs|\btheme\b|^map symbols|untitled|^simple arr",
    re.IGNORECASE,
)
_NOISE = {
    "clipart", "clip", "art", "icon", "icons", "svg", "symbol", "outline", "silhouette", "silhouet", "contour",
    "etiquette", "gnome", "mime", "vector", "cartoon", "illustration", "simple", "image", "drawing", "aiga", "stock",
    "hash", "bw", "md", "alt", "nm", "xx", "theme", "by", "draft", "sketch", "ganson", "mo", "color", "colour",
}  # fmt: skip
_SMALL = {"of", "and", "with", "in", "on", "the", "an", "for", "to", "at"}
"""Words that stand inside a name, never at its ends."""
_MOST_WORDS = 3
_NAMELESS = ("computer/icons", "computer/buttons", "unsorted")
"""Folders whose kind says nothing about a drawing without a name."""


@dataclass(frozen=True)
class Drawing:
    """One file of the collection.

    Args:
        path: below the folder of the package.
        thing: what it shows.
    """

    path: str
    thing: Thing


@PICTURES.register("clip_art")
class ClipArt(PictureSource):
    """Open Clip Art with questions on name, kind and color."""

    license = "CC-PDDC"
    origin = "Open Clip Art Library 0.18 (Debian package openclipart-svg)"
    needs = (PACKAGE, WORDS)

    def __init__(self, packages: Path) -> None:
        super().__init__(packages)
        self.folder = package_folder(packages, PACKAGE)
        self._renders = Renders(SIDES[1])
        drawings = read_drawings(self.folder, set(Words(packages, longest=14).all))
        self.drawings = {
            TRAIN: [d for d in drawings if not is_held_out(d.path) and not names_held_out(d.thing.name)],
            HELD_OUT: [d for d in drawings if is_held_out(d.path) and d.thing.name],
        }

    def items(self, split: str) -> int:
        """Number of drawings; ``held_out`` has those with a name only."""
        one_of("split", split, SPLITS)
        return len(self.drawings[split])

    def draw(self, number: int, split: str, rng: random.Random) -> Picture:
        """See :meth:`PictureSource.draw`."""
        drawings = self.drawings[split]
        drawing = drawings[number % len(drawings)]
        path = self.folder / drawing.path
        image = self._renders.get(drawing.path, lambda: read_svg(path), rng.randint(*SIDES))
        if split == TRAIN:
            refuse_held_out(" ".join((drawing.thing.name, *drawing.thing.kinds)), image)
        color = main_color(image)
        others = [other.thing for other in rng.sample(drawings, min(12, len(drawings)))]
        turns, kind = ask(drawing.thing, others, rng, color)
        keeps = keeps_of(drawing.thing.name, drawing.thing.kinds, turns)
        return Picture(image, tuple(turns), kind, frozenset(keeps))


def is_held_out(path: str) -> bool:
    """Whether a drawing is held out: one in :data:`HELD_OUT_ONE_IN`, by its file's name without numbers.

    The folder does not count, nor do numbers, as many drawings lie in two folders and many come in series.
    """
    stem = re.sub(r"[\d_\W]+", "", Path(path).stem.lower())
    return int(hashlib.sha256(stem.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def read_drawings(folder: Path, english: set[str]) -> list[Drawing]:
    """All drawings that are worth showing, each once, in a fixed order without meaning.

    Args:
        folder: of the collection.
        english: words that may stand in a name.

    Raises:
        ValueError: if there is none.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.svg")}
    texts: dict[str, Rdf] = {}
    contents: set[str] = set()
    # Files in the folder of duplicates come last, so that it is they that are left out.
    for name in sorted(files, key=lambda name: ("unsorted" in name, name)):
        svg = read_svg(files[name])
        content = hashlib.sha256(re.sub(r"<metadata.*?</metadata>", "", svg, flags=re.DOTALL).encode()).hexdigest()
        if content not in contents and not name.startswith(LEFT_OUT):
            contents.add(content)
            texts[name] = read_rdf(svg)
    if not texts:
        raise ValueError(f"{folder} holds no SVG drawings; remove it and start again")
    known = known_words(texts) | english
    titles = Counter(rdf.title.lower() for rdf in texts.values())
    drawings = [
        Drawing(name, Thing(name_of(name, rdf, known, titles[rdf.title.lower()]), kinds_of(name), _style(name)))
        for name, rdf in texts.items()
    ]
    drawings = [drawing for drawing in drawings if drawing.thing.name or not drawing.path.startswith(_NAMELESS)]
    return sorted(_limited(drawings), key=lambda d: hashlib.sha256(d.path.encode()).hexdigest())


def _limited(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Without most of the folders that hold one drawing in a thousand versions."""
    order = sorted(drawings, key=lambda d: hashlib.sha256(f"limit {d.path}".encode()).hexdigest())
    seen: Counter[str] = Counter()
    kept = []
    for drawing in order:
        limit = next((prefix for prefix in LIMITS if drawing.path.startswith(prefix)), None)
        seen[limit or ""] += 1
        if limit is None or seen[limit] <= LIMITS[limit]:
            kept.append(drawing)
    return kept


def _style(path: str) -> str:
    return "icon" if path.startswith(("computer/icons", "signs_and_symbols/map_symbols")) else "drawing"


def known_words(texts: dict[str, Rdf]) -> set[str]:
    """Words in titles, keywords and file names that two authors use: most words of other languages have but one."""
    authors: dict[str, set[str]] = defaultdict(set)
    for path, rdf in texts.items():
        author = rdf.creator.lower() or path.rpartition("/")[0]
        # Icons of programs are named by the programs' words; 400 drawings have Italian titles.
        if "architetto" not in author and not path.startswith("computer/icons"):
            for word in {w for text in (rdf.title, *rdf.keywords, _stem(path, rdf)) for w in words_of(text)}:
                authors[word].add(author)
    return {word for word, who in authors.items() if len(who) > 1}


def words_of(text: str) -> list[str]:
    """Words in lower case, without numbers; ``PointingHand2`` is two words."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text)
    return [word for word in re.findall(r"[^\W\d_]+", spaced.lower()) if len(word) > 1]


def _stem(path: str, rdf: Rdf) -> str:
    """The name of a file without its author, which many names end in, cut off anywhere: ``arrow_nicu_bucu_01``."""
    words = words_of(Path(path).stem)
    author = words_of(rdf.creator)
    for at in range(1, len(words)):
        rest = words[at:]
        if author and all(any(a.startswith(word) for a in author) for word in rest):
            return " ".join(words[:at])
    return " ".join(words)


def name_of(path: str, rdf: Rdf, known: set[str], same_title: int) -> str:
    """The name of what a drawing shows; empty if there is no reliable one.

    Args:
        path: of the file.
        rdf: its title, keywords and author.
        known: words that may stand in a name.
        same_title: number of drawings with its title.
    """
    special = name_in_folder(path, rdf.title, same_title)
    if special is not None:
        return special
    generic = not rdf.title or _GENERIC.search(rdf.title) is not None or same_title > 12
    candidates = [_stem(path, rdf)] if generic else [rdf.title, _stem(path, rdf)]
    for candidate in candidates:
        words = [word for word in words_of(candidate) if word not in _NOISE]
        while words and words[0] in _SMALL:
            words = words[1:]
        while words and words[-1] in _SMALL:
            words = words[:-1]
        large = [word for word in words if word not in _SMALL]
        if 0 < len(large) <= _MOST_WORDS and all(word in known for word in large) and max(map(len, large)) > 2:
            return " ".join(words)
    return ""
