"""The target tasks of benchmarks/reuse.py: pictures of the held-out split of each source, which no asset has seen.

- ``icons``: Fluent emoji of 60 names, a set that training has no icon of: name, kind, color, yes or no, one of three.
  Each name has three drawings; one of them is seen in the test alone.
- ``fonts``: letters, digits, numbers and 40 words in held-out families of fonts.
- ``scenes``: flat shapes, pairs of color and shape that training never shows.
- ``easy_vqa``: images of the test split.
- ``charts``: charts of a style that training never draws.

A task is a folder with the shards ``train_100``, ``train_1000``, ``train_2000`` (question-answer pairs; a smaller one
is the beginning of a larger one), ``test`` (300 questions, one in a sample), and ``card.json`` with its counts. Samples
carry ``labels``, what a linear probe is to read off the picture.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import neo_components.data.pictures.charts as drawn_charts
import neo_components.data.pictures.scenes as drawn_scenes
from neo_components.data import write_shards
from neo_components.data.convert.pretrain_mix import encode
from neo_components.data.pictures.asking import one_form, yes_no
from neo_components.data.pictures.distortions import distort
from neo_components.data.pictures.easy_vqa import question_kind, read_easy_vqa
from neo_components.data.pictures.naming import ask, keeps_of
from neo_components.data.pictures.picture import HELD_OUT, Picture
from neo_components.data.pictures.sheets import write
from neo_components.data.skip_counts import SampleError
from neo_components.data.text.turns import IMAGE_TAG
from neo_components.registry import PICTURES

PAIRS = (100, 1000, 2000)
"""Question-answer pairs of the training sets."""
QUESTIONS = 300
"""Test questions of a task."""
PER_PICTURE = {"train": 3, "test": 2}
"""Most questions about one picture."""
LONGEST = 24
"""Characters of the longest answer."""
NAMES = 60
"""Of icons."""
WORDS = [
    "able", "also", "back", "bird", "blue", "book", "call", "cold", "come", "dark", "door", "down", "each", "fish",
    "game", "good", "hand", "help", "home", "just", "keep", "life", "love", "make", "moon", "name", "next", "open",
    "park", "rain", "road", "salt", "ship", "song", "stop", "time", "tree", "walk", "wind", "work",
]  # fmt: skip
Sample = dict[str, Any]
Drawn = tuple[Picture, dict[str, str]]
"""A picture and its labels."""
Draw = Callable[[str, int, random.Random], Drawn]
"""Draws the picture of a part (train or test) and a number."""


def icons(packages: Path) -> Draw:
    """Fluent emoji: of each name one drawing is in the test, the others in training."""
    sets = PICTURES.make("icons", packages=packages).sets
    by_name: dict[str, list[Any]] = defaultdict(list)
    for icon in sets.icons[HELD_OUT]:
        by_name[icon.thing.name].append(icon)
    names = [name for name in sorted(by_name) if len(by_name[name]) == 3 and len(name) <= 12]
    names = random.Random("icons").sample(names, NAMES)
    things = [by_name[name][0].thing for name in names]

    def draw(part: str, number: int, rng: random.Random) -> Drawn:
        name = names[number % NAMES]
        order = random.Random(name).sample(by_name[name], 3)
        icon = order[0] if part == "test" else rng.choice(order[1:])
        image, color = sets.render(icon, rng.randint(96, 160), rng)
        turns, kind = ask(icon.thing, rng.sample(things, 12), rng, color)
        keeps = frozenset(keeps_of(name, icon.thing.kinds, turns))
        labels = {"name": name} | ({"kind": icon.thing.kinds[0]} if icon.thing.kinds else {})
        picture = Picture(image, tuple(turns), kind, keeps)
        return Picture(distort(picture, rng), picture.turns, kind, keeps), labels

    return draw


def fonts(packages: Path) -> Draw:
    """A letter, digit, number or word in a held-out family of fonts."""
    found = PICTURES.make("lettering", packages=packages).fonts
    families = found.families(HELD_OUT)
    kinds = {
        "letter": list("ABCDEFGHJKLMNPQRSTUVWXYZ"),
        "number": [str(number) for number in range(30)],
        "word": WORDS,
    }

    def draw(part: str, number: int, rng: random.Random) -> Drawn:
        kind = rng.choice(list(kinds))
        shown = rng.choice(kinds[kind])
        image = write(rng, rng.choice(found.faces(rng.choice(families))), shown).image
        turns = [(one_form(rng, "what {kind} is this?|which {kind} is shown?|read the {kind}.", kind=kind), shown)]
        truth = rng.random() < 0.5
        other = shown if truth else rng.choice([one for one in kinds[kind] if one != shown])
        turns.insert(0, (f"is this {other}?", yes_no(truth)))
        turns.insert(0, ("is it a letter, a number or a word?", kind))
        return Picture(image, tuple(turns[rng.choice((0, 1, 2, 2)) :]), "text"), {kind: shown, "kind": kind}

    return draw


def scenes(packages: Path) -> Draw:
    """Flat shapes, at least one of a pair of color and shape that training never shows."""

    def draw(part: str, number: int, rng: random.Random) -> Drawn:
        background = rng.choice(drawn_scenes.GROUNDS)(rng)
        things = drawn_scenes.distinct(rng, HELD_OUT, background, rng.randint(1, 4))
        turns = drawn_scenes.asked(rng, things, HELD_OUT)
        labels = {"count": str(len(things))}
        if len(things) == 1:
            labels |= {"color": things[0].color, "shape": things[0].shape}
        return Picture(drawn_scenes.render(rng, things, background), turns, "scene"), labels

    return draw


def easy_vqa(packages: Path) -> Draw:
    """The test split; every fifth image is in the test here."""
    source, images = PICTURES.make("easy_vqa", packages=packages), read_easy_vqa("test")
    numbers = range(len(images))
    parts = {"test": numbers[::5], "train": [number for number in numbers if number % 5]}

    def draw(part: str, number: int, rng: random.Random) -> Drawn:
        index = parts[part][number % len(parts[part])]
        labels = {question_kind(answer): answer for _, answer in images[index].questions}
        labels.pop("yes_no", None)
        return source.draw(index, HELD_OUT, rng), labels

    return draw


def charts(packages: Path) -> Draw:
    """Charts of a style that training never draws."""
    source = PICTURES.make("charts", packages=packages)

    def draw(part: str, number: int, rng: random.Random) -> Drawn:
        style = drawn_charts.KINDS[HELD_OUT][number % 3]
        canvas = drawn_charts.new_canvas(rng, source.fonts.pick_plain(rng, HELD_OUT))
        data = drawn_charts.random_data(rng, style, source.words, canvas.ground)
        drawn_charts.STYLES[style](canvas, data)
        turns = drawn_charts.some(rng, *drawn_charts.chart_turns(rng, style, data, named=False))
        labels = {"style": style, "count": str(len(data.categories))}
        return Picture(canvas.image.reduce(2), turns, "chart"), labels

    return draw


TASKS: dict[str, Callable[[Path], Draw]] = {
    "icons": icons, "fonts": fonts, "scenes": scenes, "easy_vqa": easy_vqa, "charts": charts,
}  # fmt: skip


def train_folder(root: Path, task: str, pairs: int = PAIRS[-1]) -> Path:
    """Shards of a task's training pairs."""
    return root / "tasks" / task / f"train_{pairs}"


def test_folder(root: Path, task: str) -> Path:
    """Shards of a task's test questions."""
    return root / "tasks" / task / "test"


def card_of(root: Path, task: str) -> dict[str, Any]:
    """Counts of a task: pictures, questions, kinds of questions, and ``blind``, the exact match without pictures."""
    found: dict[str, Any] = json.loads((root / "tasks" / task / "card.json").read_text(encoding="utf-8"))
    return found


def make_task(root: Path, task: str, packages: Path) -> None:
    """Makes a task that is not there yet.

    Args:
        root: folder of the benchmark.
        task: one of :data:`TASKS`.
        packages: folder of the packages that the sources draw from.

    Raises:
        FileNotFoundError: if a package is missing.
    """
    if not (root / "tasks" / task / "card.json").exists():
        write_task(root / "tasks" / task, task, TASKS[task](packages))


def to_turns(pairs: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Pairs of question and answer as a conversation about one picture."""
    turns = []
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": f"{IMAGE_TAG}\n{question}" if number == 0 else question})
        turns.append({"from": "gpt", "value": answer})
    return turns


def pairs_of(sample: Sample) -> list[tuple[str, str]]:
    """Pairs of question and answer of a conversation."""
    turns = [turn["value"] for turn in sample["conversations"]]
    return [(q.removeprefix(f"{IMAGE_TAG}\n"), a) for q, a in zip(turns[::2], turns[1::2], strict=True)]


def drawn(name: str, draw: Draw, part: str, pairs: int) -> Iterator[Sample]:
    """Samples of a part with so many pairs in all."""
    number = 0
    while pairs > 0:
        rng = random.Random(f"{name} {part} {number}")
        number += 1
        try:
            picture, labels = draw(part, number, rng)
        except SampleError:
            continue
        turns = [turn for turn in picture.turns if len(turn[1]) <= LONGEST and picture.kind != "caption"]
        kept = turns[-min(PER_PICTURE[part], pairs) :]
        pairs -= len(kept)
        if kept:
            shown = encode(picture.image.convert("RGB"))
            yield {"key": f"{number:05d}", "conversations": to_turns(kept), "images": [shown], "labels": labels}


def write_task(folder: Path, name: str, draw: Draw, questions: int = QUESTIONS, sizes: Sequence[int] = PAIRS) -> None:
    """Writes test questions one by one, the training sets, and the card.

    Raises:
        ValueError: if training and test have a picture in common.
    """
    train, test = list(drawn(name, draw, "train", sizes[-1])), list(drawn(name, draw, "test", questions))
    seen, asked = ({hashlib.sha256(sample["images"][0]).digest() for sample in some} for some in (train, test))
    if both := len(seen & asked):
        raise ValueError(f"training and test of {name} have {both} pictures in common")
    for size in sizes:
        write_shards(_first(train, size), folder / f"train_{size}")
    write_shards(_single(test), folder / "test")
    pairs = [pair for sample in test for pair in pairs_of(sample)]
    card = {
        "train pictures": len(seen), "test pictures": len(asked), "questions": len(pairs), "blind": blind(pairs, train)
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _first(samples: Iterable[Sample], pairs: int) -> Iterator[Sample]:
    for sample in samples:
        kept = pairs_of(sample)[:pairs]
        pairs -= len(kept)
        if kept:
            yield sample | {"conversations": to_turns(kept)}


def _single(samples: Iterable[Sample]) -> Iterator[Sample]:
    for sample in samples:
        for number, pair in enumerate(pairs_of(sample)):
            kind = "yes_no" if pair[1] in ("yes", "no") else "open"
            yield sample | {"key": f"{sample['key']}-{number}", "conversations": to_turns([pair]), "kind": kind}


def blind(questions: Sequence[tuple[str, str]], train: Iterable[Sample]) -> float:
    """Exact match of the most frequent training answer to each question, of all answers where a question is new."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in train:
        for question, answer in pairs_of(sample):
            seen[question][answer] += 1
    overall = sum(seen.values(), Counter()).most_common(1)[0][0]
    best = {question: counts.most_common(1)[0][0] for question, counts in seen.items()}
    return sum(answer == best.get(question, overall) for question, answer in questions) / len(questions)
