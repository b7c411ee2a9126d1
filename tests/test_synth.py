"""Synthetic scenes: answers follow from the scene, a reader who does not see it is at chance, seeds decide all."""

from __future__ import annotations

import io
import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from commands import good
from PIL import Image

from neo_components.data import read_shards
from neo_components.data.convert.synth import COLORS, SHAPES, SIZES, Thing, draw_image, draw_scene, nearest, scenes

THINGS = [
    Thing("red", "circle", "small", 0.5, 0.5, 0.2, (230, 30, 50)),
    Thing("blue", "square", "large", 2.5, 0.6, 0.4, (60, 70, 210)),
    Thing("green", "triangle", "small", 1.4, 0.7, 0.25, (30, 180, 70)),
    Thing("black", "circle", "large", 1.5, 2.5, 0.4, (20, 20, 20)),
]


def test_a_picture_shows_its_scene() -> None:
    image = Image.open(io.BytesIO(draw_image(THINGS, (230, 240, 250))))
    assert image.size == (96, 96)
    for thing in THINGS:
        assert image.getpixel((round(thing.x * 32), round(thing.y * 32 + 3))) == thing.rgb
    assert image.getpixel((16, 80)) == (230, 240, 250)
    assert image.getpixel((80, 19 - 12)) == THINGS[1].rgb and image.getpixel((80, 19 - 14)) == (230, 240, 250)
    assert [thing.place for thing in THINGS] == ["top left", "top right", "top center", "bottom center"]


def test_looks_vary_and_keep_their_names() -> None:
    """Backgrounds differ, a shape fills its cell at most, and its shade is nearer to its own colour than to another."""
    samples = list(scenes(60, seed=5))
    assert len({Image.open(io.BytesIO(s["images"][0])).getpixel((0, 0)) for s in samples}) > 50
    rng = random.Random(0)
    things = [thing for _ in range(200) for thing in draw_scene(rng)]
    assert len({thing.rgb for thing in things}) > 500
    for thing in things:
        assert SIZES[thing.size][0] <= thing.half <= SIZES[thing.size][1]
        assert min(COLORS, key=lambda name: math.dist(COLORS[name], thing.rgb)) == thing.color
        assert abs(thing.x % 1 - 0.5) + thing.half <= 0.5 + 1e-9


def test_nearest_by_hand() -> None:
    red, blue, green, black = THINGS
    assert nearest(red, THINGS) is green and nearest(black, THINGS) is green
    assert nearest(green, [green, red, replace(blue, x=2.3, y=0.5)]) is None  # both at 0.92
    assert nearest(red, [red]) is None and nearest(red, [red, blue]) is blue


def answer(question: str, scene: list[dict[str, object]]) -> str:
    """A second reading of the questions, from the scene that a sample keeps."""
    where = {str(t["name"]): (float(str(t["x"])), float(str(t["y"]))) for t in scene}
    if found := re.match(r"where is the (.*)\?", question):
        x, y = where[found[1]]
        return f"{('top', 'middle', 'bottom')[int(y)]} {('left', 'center', 'right')[int(x)]}"
    if found := re.match(r"is the (\w+ \w+) (.*?) the (\w+ \w+)\?", question):
        (x, y), (u, v) = where[found[1]], where[found[3]]
        return "yes" if {"left of": x < u, "right of": x > u, "above": y < v, "below": y > v}[found[2]] else "no"
    if found := re.match(r"what color is the shape nearest to the (.*)\?", question):
        x, y = where.pop(found[1])
        return min(where, key=lambda n: (where[n][0] - x) ** 2 + (where[n][1] - y) ** 2).split()[0]
    found = re.match(r"how many (\w+?)s?(?: shapes)? are there\?", question)
    assert found, question
    return str(sum(found[1] in name.split() for name in where))


def test_answers_follow_and_blind_readers_are_at_chance() -> None:
    """The commonest answer to each wording, counted over 4000 samples; chance and the answers' spread are the bound."""
    samples = list(scenes(4000, seed=3))
    heard: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for sample in samples:
        question, told = (turn["value"] for turn in sample["conversations"])
        question = question.removeprefix("<image>\n")
        assert answer(question, sample["scene"]) == told
        wording = re.sub(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", "THING", question)
        heard[sample["kind"]][wording][told] += 1
    blind = {kind: sum(max(counts.values()) for counts in wordings.values()) / 1000 for kind, wordings in heard.items()}
    assert set(blind) == {"place", "relation", "nearest", "count"}
    for kind, chance in {"place": 1 / 9, "relation": 1 / 2, "nearest": 1 / 6, "count": 1 / 4}.items():
        assert chance * 0.8 <= blind[kind] <= chance + 0.09, (kind, blind[kind])


def test_seeds_decide_all_and_shards_are_written(tmp_path: Path) -> None:
    assert list(scenes(8, seed=1)) == list(scenes(8, seed=1)) != list(scenes(8, seed=2))
    out = good("data", "synth", "-o", tmp_path / "a", "--count", "6", "--seed", "1", "--kind", "place")
    assert out == f"read 6, written 6: {tmp_path / 'a'}\n"
    read = list(read_shards(tmp_path / "a"))
    assert [sample["kind"] for sample in read] == ["place"] * 6 and all(len(s["images"]) == 1 for s in read)
    good("data", "synth", "-o", tmp_path / "b", "--count", "2", "--captions")
    [first, _] = read_shards(tmp_path / "b")
    told = first["conversations"][1]["value"].split(", ")
    assert first["kind"] == "caption" and len(told) == len(first["scene"])
    assert all(re.fullmatch(r"a (small|large) \w+ \w+ at the \w+ \w+", part) for part in told)


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        list(scenes(0))
    with pytest.raises(ValueError, match="kind must be one of place, relation, nearest, count, got 'size'"):
        list(scenes(1, kinds=["size"]))
    with pytest.raises(ValueError, match="kind must name at least one of"):
        list(scenes(1, kinds=[]))
