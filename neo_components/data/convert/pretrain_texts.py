"""Text alone for the pretraining mix, so that a language model's words stay in use beside the pictures.

Everything follows from rules or from the named things of the pictures: arithmetic, spelling, what belongs to what,
color mixtures of scenes in words, with questions that the words answer. No image of the same thing is drawn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from neo_components.data.convert.base import Converter
from neo_components.data.pictures.held_out_pairs import held_out_colors, words_in
from neo_components.data.pictures.icons import FLUENT, NOTO, TABLER, icon_sets
from neo_components.data.pictures.naming import COLOR_WORDS, Thing, with_article
from neo_components.data.pictures.packages import PACKAGES
from neo_components.data.pictures.picture import TRAIN
from neo_components.data.shards.format import RawSample
from neo_components.errors import ArgumentError

Turns = list[tuple[str, str]]

_COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "gray", "black", "white")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


@dataclass
class PretrainTexts(Converter):
    """Text alone, made of rules and of the names of the pictures.

    Args:
        packages: Folder of the unpacked packages.
        count: Number of conversations.
        seed: The same seed gives the same samples.

    Raises:
        ValueError: if the number is not possible.
    """

    shard_size: ClassVar[int] = 10_000
    needs: ClassVar[tuple[str, ...]] = (NOTO, TABLER, FLUENT)

    packages: Path
    count: int = 128_571
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise ArgumentError("count", f"must be 1 or more, got {self.count}")
        things(self.packages)

    def records(self) -> Iterator[tuple[str, int]]:
        """The kinds in turn."""
        kinds = list(KINDS)
        for number in range(self.count):
            yield kinds[number % len(kinds)], number

    def sample(self, record: tuple[str, int]) -> RawSample:
        """A conversation of one to four turns."""
        kind, number = record
        rng = random.Random(f"{self.seed} text {kind} {number}")
        turns = KINDS[kind](things(self.packages), rng)
        texts = [
            {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return {"key": f"text-{kind}-{number:09d}", "conversations": texts, "source": "text", "kind": kind}

    def total(self) -> int:
        """Number of the conversations."""
        return self.count

    @property
    def sources(self) -> list[Path]:
        """The folder of packages."""
        return [self.packages]

    def identity(self) -> dict[str, Any]:
        """Number, seed, kinds and the checksums of the packages, whose names are used."""
        return {
            "converter": "pretrain_texts",
            "options": {"count": self.count, "seed": self.seed, "kinds": list(KINDS)},
            "packages": {name: PACKAGES[name].sha256 for name in sorted(self.needs)},
        }


@cache
def things(packages: Path) -> tuple[Thing, ...]:
    """The named emoji of the train split, which have kinds."""
    return tuple(icon.thing for icon in icon_sets(packages).icons[TRAIN] if icon.kind == "noto" and icon.thing.kinds)


def _belongs(known: Sequence[Thing], rng: random.Random) -> Turns:
    """Which kind a thing is of, and which of some things is of a kind."""
    turns: Turns = []
    for thing in rng.sample(known, rng.randint(1, 4)):
        kind = thing.kinds[0]
        if rng.random() < 0.5:
            turns.append((f"what kind of thing is {with_article(thing.name)}?", kind))
        else:
            others = [one for one in rng.sample(known, 12) if kind not in one.kinds][:2]
            names = [thing.name, *(one.name for one in others)]
            rng.shuffle(names)
            turns.append((f"which belongs to the kind {kind}: {', '.join(names)}?", thing.name))
    return turns


def _spelling(known: Sequence[Thing], rng: random.Random) -> Turns:
    """Letters of a word: all, the first, the last, how many; the word of some letters."""
    turns: Turns = []
    for _ in range(rng.randint(1, 3)):
        word = rng.choice(rng.choice(known).name.split())
        letters = " ".join(word)
        turns.append(
            rng.choice((
                (f"spell {word}.", letters),
                (f"which word is spelled {letters}?", word),
                (f"how many letters has the word {word}?", str(len(word))),
                (f"what is the first letter of {word}?", word[0]),
                (f"what is the last letter of {word}?", word[-1]),
                (f"write {word} in capital letters.", word.upper()),
            ))
        )  # fmt: skip
    return turns


def _arithmetic(known: Sequence[Thing], rng: random.Random) -> Turns:
    """Sums, differences, products, comparisons and what comes next."""
    turns: Turns = []
    for _ in range(rng.randint(1, 4)):
        one, other = rng.randint(0, 60), rng.randint(0, 40)
        small, count = rng.randint(2, 12), rng.randint(2, 12)
        high, low = max(one, other), min(one, other)
        turns.append(
            rng.choice((
                (f"what is {one} + {other}?", str(one + other)),
                (f"what is {high} - {low}?", str(high - low)),
                (f"what is {small} times {count}?", str(small * count)),
                (f"which number comes after {one}?", str(one + 1)),
                (f"write {_NUMBERS[small]} as a number.", str(small)),
                (f"write {small} as a word.", _NUMBERS[small]),
                (f"what comes next: {one}, {one + small}, {one + 2 * small}?", str(one + 3 * small)),
                (f"which is more, {one} or {other + (one == other)}?", str(max(one, other + (one == other)))),
            ))
        )  # fmt: skip
    return turns


def _scenes(known: Sequence[Thing], rng: random.Random) -> Turns:
    """A picture in words, and questions that the words answer: where, what color, how many, left and right."""
    names = _plain(known, rng.randint(2, 4), rng)
    colors = rng.sample(_COLORS, len(names))
    while any(color in held_out_colors(name) for color, name in zip(colors, names, strict=True)):
        colors = rng.sample(_COLORS, len(names))
    count = rng.randint(2, 9)
    row = ", then ".join(f"{with_article(f'{color} {name}')}" for color, name in zip(colors, names, strict=True))
    opening = f"from left to right: {row}. below them are {_NUMBERS[count]} dots."
    at = rng.randrange(len(names))
    asked: Turns = [
        ("what is on the left?", names[0]),
        ("what is on the right?", names[-1]),
        (f"what color is the {names[at]}?", colors[at]),
        (f"what is {colors[at]}?", f"the {names[at]}"),
        ("how many dots are there?", str(count)),
        ("how many things are above the dots?", str(len(names))),
        (f"is the {names[0]} to the left of the {names[-1]}?", "yes"),
        (f"is the {names[0]} to the right of the {names[-1]}?", "no"),
    ]
    turns = rng.sample(asked, rng.randint(1, 3))
    return [(f"{opening} {turns[0][0]}", turns[0][1]), *turns[1:]]


def _plain(known: Sequence[Thing], count: int, rng: random.Random) -> list[str]:
    """Names of different things that name no color, as ``red apple`` does."""
    names: list[str] = []
    while len(names) < count:
        name = rng.choice(known).name
        if name not in names and words_in(name).isdisjoint(COLOR_WORDS):
            names.append(name)
    return names


def _repeating(known: Sequence[Thing], rng: random.Random) -> Turns:
    """Lists: the second, the last, in reverse, what is missing."""
    names = [thing.name for thing in rng.sample(known, rng.randint(3, 5))]
    left_out = rng.choice(names)
    shuffled = [name for name in names if name != left_out]
    rng.shuffle(shuffled)
    asked: Turns = [
        ("what is the second one?", names[1]),
        ("what is the last one?", names[-1]),
        ("repeat the list from the end.", ", ".join(reversed(names))),
        ("how many are there?", str(len(names))),
        (f"which one is missing here: {', '.join(shuffled)}?", left_out),
        (f"what comes after {names[0]}?", names[1]),
    ]
    turns = rng.sample(asked, rng.randint(1, 3))
    return [(f"{', '.join(names)}. {turns[0][0]}", turns[0][1]), *turns[1:]]


KINDS: dict[str, Callable[[Sequence[Thing], random.Random], Turns]] = {
    "belongs": _belongs,
    "spelling": _spelling,
    "arithmetic": _arithmetic,
    "scenes": _scenes,
    "lists": _repeating,
}
"""Makers of conversations by kind."""
