"""Questions on one named thing: its name, kind and color, yes or no, one of three, a caption.

Questions go from coarse to fine, so that no answer is given away by an earlier turn.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from neo_components.data.pictures.held_out_pairs import held_out_colors, words_in
from neo_components.data.pictures.palette import NAMES as COLORS
from neo_components.data.pictures.picture import COLOR, MIRROR, TURN

NAME, KIND, CHOICE, YES_NO, CAPTION, COLOR_OF = "name", "kind", "choice", "yes_no", "caption", "color"

_ASK_NAME = (
    "what is this?", "what is shown?", "what does the picture show?", "name the object.", "what do you see?",
    "what is in the picture?", "which thing is shown here?", "say in a few words what this is.",
)  # fmt: skip
_ASK_KIND = (
    "what kind of thing is this?", "what kind of thing is shown?", "which category does this belong to?",
    "what sort of thing does the picture show?",
)  # fmt: skip
_ASK_YES_NO = ("is this {}?", "does the picture show {}?", "is {} shown here?", "do you see {}?")
_ASK_TOPIC = ("is this about {}?", "does the picture belong to {}?", "is this something of {}?")
_ASK_CHOICE = ("which is it: {}, {} or {}?", "is this {}, {} or {}?", "does the picture show {}, {} or {}?")
_ASK_CAPTION = (
    "describe the picture.", "write a caption.", "give a short description.", "caption:", "describe what you see.",
    "what is in the picture? answer in a sentence.",
)  # fmt: skip
_ASK_COLOR = ("what color is it mostly?", "which color is the {style} mostly?", "what is its main color?")
_CAPTIONS = (
    "{a_style} of {thing}.", "{a_style} that shows {thing}.", "this is {a_style} of {thing}.", "{thing}.",
    "the picture shows {thing}.", "{a_style}: {name}.",
)  # fmt: skip

_NO_ARTICLE = {
    "the", "a", "an", "some", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
}  # fmt: skip
_MASS = {
    "food", "clothing", "furniture", "weather", "music", "money", "bread", "meat", "electronics", "science", "milk",
    "water", "people", "religion", "clothes", "cheese", "rice", "wine", "beer", "astronomy",
}  # fmt: skip
_TOPICS = {
    "education", "computing", "recreation", "holiday", "christmas", "music", "religion", "science", "astronomy",
    "medicine", "weather", "transport", "party", "hardware", "electronics", "dairy", "sport", "office supply", "nature",
    "travel", "health", "math", "media", "text", "money", "furniture", "clothing", "jewelry", "food or drink",
}  # fmt: skip
"""Kinds that no single thing is called by."""

COLOR_WORDS = frozenset((*COLORS, "grey", "golden", "gold", "silver", "bronze", "blond", "violet", "leafy"))
_COLORED = COLOR_WORDS | {
    "1st", "2nd", "3rd", "flag", "flags", "moon", "chequered", "checkered", "semaphore", "negative", "inverted", "dark",
    "bright",
}  # fmt: skip
"""Words of names that are wrong in other colors."""
_COLORED_KINDS = frozenset(("flag", "semaphore signal", "color gradient"))
_DIRECTED = frozenset((
    "left", "leftwards", "right", "rightwards", "up", "upwards", "upside", "down", "downwards", "top", "bottom", "back",
    "forward", "forwards", "backward", "backwards", "backspace", "reverse", "rewind", "fast", "next", "last",
    "previous", "prev", "first", "skip", "skipped", "track", "tracks", "player", "play", "eject", "turn", "turned",
    "rotate", "rotated", "rotating", "rotation", "clockwise", "counterclockwise", "arrow", "arrows", "chevron",
    "chevrons", "caret", "corner", "corners", "pointing", "facing", "tilted", "north", "south", "east", "west", "ne",
    "nw", "se", "sw", "horizontal", "vertical", "horizontally", "vertically", "diagonal", "flip", "transform",
    "direction", "directions", "departure", "arrival", "takeoff", "landing", "inbox", "outbox", "incoming", "outgoing",
    "upload", "download", "login", "logout", "import", "export", "enter", "exit", "indent", "increase", "increasing",
    "decrease", "decreasing", "trending", "stairs", "sort", "sorted", "ascending", "descending", "greater", "lower",
    "less", "than", "math", "semaphore", "signal", "flag", "flags", "letter", "letters", "latin", "alphabet", "alpha",
    "beta", "delta", "lambda", "omega", "sigma", "pi", "number", "numbers", "digit", "keycap", "text", "abc", "moon",
    "quarter", "crescent", "gibbous", "waxing", "waning", "half", "square", "root", "clock", "oclock", "thirty", "hour",
    "clockface", "map", "globe", "hemisphere", "question", "exclamation", "quote", "quotes", "ampersand", "percent",
    "percentage", "multiply", "divide", "plus", "subtract", "equals", "not", "slash", "backslash", "slashes", "dollar",
    "euro", "yen", "pound", "currency", "bracket", "parenthesis", "braces", "brackets", "hourglass", "sunrise",
    "sunset", "zodiac", "card", "playing", "ace", "jack", "queen", "king", "script", "kanji", "hiragana", "katakana",
    "japanese", "chinese", "align", "border", "box", "layout", "sidebar", "stack", "superscript", "subscript",
    *string.ascii_lowercase,
))  # fmt: skip
"""Words of names that are wrong of a picture that is mirrored or rotated."""
_DIRECTED_KINDS = frozenset((
    "flag", "arrow", "letter", "number", "math", "currency", "text", "symbol", "zodiac sign", "sign", "road sign",
    "map", "map symbol", "semaphore signal", "clock", "playing card", "document", "chart", "diagram", "face",
    "smiley face",
))  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """A thing that a picture shows.

    Args:
        name: what it is, without article; empty if it has no reliable name.
        kinds: names of what it belongs to, the finest first; may be empty.
        style: of the picture: ``drawing``, ``icon``, ``emoji``.
    """

    name: str
    kinds: tuple[str, ...]
    style: str


def keeps_of(name: str, kinds: Sequence[str], turns: Sequence[tuple[str, str]]) -> set[str]:
    """What distortions must leave alone, as the name or an answer rests on it.

    Args:
        name: of what is shown; of several things, all their names.
        kinds: of what is shown.
        turns: pairs of question and answer.

    Returns:
        COLOR if name, kind, a question or an answer names a color, or the thing is a shape that is held out in some
        color; TURN and MIRROR if the thing is another one, or none, when it is mirrored or rotated.
    """
    words, keeps = words_in(name), set[str]()
    said = set(re.findall(r"[a-z]+", " ".join(text for turn in turns for text in turn).lower()))
    shape = bool(held_out_colors(" ".join((name, *kinds))))
    if words & _COLORED or _COLORED_KINDS.intersection(kinds) or said & COLOR_WORDS or shape:
        keeps.add(COLOR)
    if words & _DIRECTED or _DIRECTED_KINDS.intersection(kinds) or any(word[0].isdigit() for word in words):
        keeps |= {TURN, MIRROR}
    return keeps


def called(thing: Thing, name: str = "") -> str:
    """A name in a sentence: with an article, but for icons, whose names are ideas: ``database search``."""
    return (name or thing.name) if thing.style == "icon" else with_article(name or thing.name)


def with_article(name: str) -> str:
    """``dog`` -> ``a dog``; plurals, names with a capital letter and mass nouns stay."""
    first, last = name.split()[0], name.split()[-1].lower()
    plural = last.endswith("s") and not last.endswith(("ss", "us", "is"))
    if first.lower() in _NO_ARTICLE or plural or last in _MASS or first[0].isdigit() or first[0].isupper():
        return name
    sounds_vowel = first[0].lower() in "aeiou" and not first.startswith(("uni", "use", "eu", "one"))
    return f"{'an' if sounds_vowel else 'a'} {name}"


def ask(
    thing: Thing, others: Sequence[Thing], rng: random.Random, color: str | None = None, most: int = 4
) -> tuple[list[tuple[str, str]], str]:
    """Draws one to ``most`` questions on a thing.

    Args:
        thing: what is shown.
        others: some other things, for wrong alternatives; those that share its name or kind are not used as such.
        rng: of the choice.
        color: its main color if it clearly has one.
        most: number of questions.

    Returns:
        the (question, answer) pairs, and the kind of the last identity question, for reports.
    """
    turns: list[tuple[str, str]] = []
    wanted = rng.choices((1, 2, 3, 4), (5, 3, 2, 1))[0]
    wanted = min(wanted, most)
    kind = KIND
    if thing.name:
        kind = rng.choices((NAME, CHOICE, YES_NO, CAPTION), (5, 2, 2, 3))[0]
    fine = _fine(kind, thing, others, rng)
    if color is not None and wanted > 1 and rng.random() < 0.6:
        turns.append((rng.choice(_ASK_COLOR).format(style=thing.style), color))
    if wanted > 1 + len(turns) and kind != KIND and thing.kinds:
        turns.append(_kind_yes_no(thing, others, rng) if rng.random() < 0.4 else _kind(thing, rng))
    if wanted > 1 + len(turns) and kind == NAME and rng.random() < 0.5 and (no := _other_name(thing, others, rng)):
        turns.append((rng.choice(_ASK_YES_NO).format(called(thing, no)), "no"))
    return [*turns, fine], kind


def _fine(kind: str, thing: Thing, others: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    if kind == NAME:
        return rng.choice(_ASK_NAME), thing.name
    if kind == CAPTION:
        return rng.choice(_ASK_CAPTION), caption(thing, rng)
    if kind == YES_NO:
        no = _other_name(thing, others, rng) if rng.random() < 0.5 else None
        return rng.choice(_ASK_YES_NO).format(called(thing, no or thing.name)), "no" if no else "yes"
    if kind == CHOICE:
        wrong = sorted({o.name for o in others if different(thing, o)})
        names = [thing.name, *rng.sample(wrong, min(2, len(wrong)))]
        if len(names) < 3:
            return rng.choice(_ASK_NAME), thing.name
        rng.shuffle(names)
        return rng.choice(_ASK_CHOICE).format(*(called(thing, name) for name in names)), thing.name
    return _kind(thing, rng) if thing.kinds else (rng.choice(_ASK_CAPTION), f"{with_article(thing.style)}.")


def _kind(thing: Thing, rng: random.Random) -> tuple[str, str]:
    return rng.choice(_ASK_KIND), thing.kinds[0]


def _kind_yes_no(thing: Thing, others: Sequence[Thing], rng: random.Random) -> tuple[str, str]:
    wrong = sorted({kind for other in others for kind in other.kinds if kind not in (*thing.kinds, thing.name)})
    no = rng.random() < 0.5 and bool(wrong)
    kind = rng.choice(wrong) if no else rng.choice(thing.kinds)
    asked = _ASK_TOPIC if kind in _TOPICS else _ASK_YES_NO
    return rng.choice(asked).format(kind if kind in _TOPICS else with_article(kind)), "no" if no else "yes"


def _other_name(thing: Thing, others: Sequence[Thing], rng: random.Random) -> str | None:
    wrong = sorted({other.name for other in others if different(thing, other)})
    return rng.choice(wrong) if wrong else None


def different(one: Thing, other: Thing) -> bool:
    """Whether the name of the other one is wrong for this one: no word in common, and not its kind."""
    return bool(other.name) and not (
        set(_words(one.name)) & set(_words(other.name)) or other.name in one.kinds or one.name in other.kinds
    )


def _words(name: str) -> list[str]:
    return [word.rstrip("s") for word in name.lower().split() if len(word) > 2]


def caption(thing: Thing, rng: random.Random) -> str:
    """A sentence on it."""
    text = rng.choice(_CAPTIONS)
    named = called(thing)
    if thing.kinds and rng.random() < 0.2:
        named = f"{named}, {with_article(thing.kinds[0])}"
    return text.format(a_style=with_article(thing.style), thing=named, name=thing.name)
