"""Drawings, names, colors and distortions: rendered sizes, names worked out by hand, what distortions leave alone."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from picture_builders import make_packages, rdf, svg
from PIL import Image

from neo_components.data.pictures.backgrounds import background, brightness
from neo_components.data.pictures.clip_art import ClipArt, is_held_out, name_of
from neo_components.data.pictures.clip_art_folders import kinds_of
from neo_components.data.pictures.colors import NAMES, main_color, named
from neo_components.data.pictures.distortions import LONGEST, SHORTEST, distort
from neo_components.data.pictures.grid_questions import Placed, ask_about, describe, place_of
from neo_components.data.pictures.icons import Icons
from neo_components.data.pictures.naming import Thing, ask, with_article
from neo_components.data.pictures.picture import COLOR, DETAIL, FRAME, MIRROR, TURN, Picture
from neo_components.data.pictures.svg import Rdf, Renders, read_rdf, render, size
from neo_components.data.skip_counts import SampleError

KNOWN = {"lion", "giraffe", "old", "lamp", "book", "open", "stick"}


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('width="40" height="30"', (40, 30)),
        ('width="72pt" height="1in"', (96, 96)),
        ('width="25.4mm" height="5.08cm"', (96, 192)),
        ('viewBox="0 0 20 10"', (20, 10)),
        ('width="100%" height="100%" viewBox="0,0,30,60"', (30, 60)),
        ('width="40" viewBox="0 0 20 10"', (40, 20)),
    ],
)
def test_sizes_of_drawings(attributes: str, expected: tuple[float, float]) -> None:
    """In all units: resvg takes lengths in points or millimeters for zero unless it has a resolution."""
    assert size(svg(attributes=attributes)) == pytest.approx(expected)
    image = render(svg(attributes=attributes), 60)
    assert max(image.size) == 60 and image.width / image.height == pytest.approx(expected[0] / expected[1], abs=0.02)
    assert image.getpixel((image.width // 2, image.height // 2)) == (255, 0, 0, 255)
    assert image.getpixel((image.width - 2, image.height // 2)) == (0, 0, 0, 0)


def test_drawings_that_cannot_be_used() -> None:
    for text, reason in (
        ("<p>no drawing</p>", "unreadable"),
        (svg().replace("</svg>", ""), "unreadable"),
        (svg(attributes='width="500" height="30"'), "aspect_ratio"),
        (svg(attributes='width="0" height="0" viewBox="0 0 0 0"'), "unreadable"),
        (svg(attributes=""), "unreadable"),
        (svg("none"), "empty"),
        (svg() + " " * 400_000, "too_large"),
        (svg(rdf="<feBlend/>" * 200), "too_large"),
    ):
        with pytest.raises(SampleError) as error:
            render(text, 64, "a.svg")
        assert error.value.reason == reason and "a.svg" in str(error.value)


def test_drawings_are_kept() -> None:
    renders, read = Renders(side=80, most=1), list[str]()
    for name, side in (("a", 40), ("a", 20), ("b", 80), ("b", 80)):
        image = renders.get(name, lambda name=name: read.append(name) or svg(), side)  # type: ignore[misc]
        assert image.size == (side, side * 3 // 4) and image.getpixel((side // 2, side // 2)) == (255, 0, 0, 255)
    assert read == ["a", "b", "b"]  # there is room for one


def test_rdf() -> None:
    text = svg(rdf=rdf("Cat &amp; dog", "animal", "", " big\ncat ", creator="Gerald G."))
    assert read_rdf(text) == Rdf("Cat & dog", ("animal", "big cat"), "Gerald G.")
    assert read_rdf(svg()) == Rdf("", (), "")


@pytest.mark.parametrize(
    ("path", "title", "creator", "name"),
    [
        ("animals/mammals/lion_01.svg", "Old Lion", "Ann", "old lion"),
        ("animals/mammals/leone_ann_01.svg", "Leone", "Ann", ""),
        (
            "animals/mammals/contour_giraffe.svg",
            "Clipart by Nicu Buculei - contour_chipmunk",
            "Nicu Buculei",
            "giraffe",
        ),
        ("office/lamp_nicu_bucu_01.svg", "Untitled", "Nicu Buculei", "lamp"),
        ("education/books/book.svg", "An open book of the old lion with a lamp", "Ann", "book"),
        ("recreation/games/cards/simple/simple_h_10.svg", "card", "Ann", "ten of hearts"),
        ("recreation/games/cards/white/white_c_q.svg", "card", "Ann", "queen of clubs"),
        ("signs_and_symbols/flags/europe/wales.svg", "United Kingdom - Wales", "Ann", "flag of Wales"),
        (
            "signs_and_symbols/flags/america/united_states/usa_new_york.svg",
            "Flags of the USA",
            "Ann",
            "flag of New York",
        ),
        ("signs_and_symbols/flags/signalflag_kilo.svg", "Signal flags", "Ann", "signal flag kilo"),
        ("geography/norway_01.svg", "Map of Norway", "Ann", "map of Norway"),
        ("shapes/stars/star_50pt23step.svg", "gramastar", "Ann", "star"),
    ],
)
def test_names_of_drawings(path: str, title: str, creator: str, name: str) -> None:
    assert name_of(path, Rdf(title, (), creator), KNOWN, 1) == name


def test_kinds_of_drawings() -> None:
    assert kinds_of("animals/mammals/dogs/a.svg") == ("dog", "mammal", "animal")
    assert kinds_of("signs_and_symbols/flags/europe/france/a.svg") == ("flag",)
    assert kinds_of("unsorted/a.svg") == ()


def test_held_out_drawings(tmp_path: Path) -> None:
    """Series and copies in other folders are held out together; no drawing is in both splits."""
    assert is_held_out("a/hummer_01.svg") == is_held_out("b/c/hummer_7.svg")
    held = sum(is_held_out(f"{chr(97 + n // 26 % 26)}{chr(97 + n % 26)}{'x' * (n // 676)}.svg") for n in range(2000))
    assert 70 < held < 130
    source = ClipArt(make_packages(tmp_path))
    paths = {split: {d.path for d in source.drawings[split]} for split in ("train", "held_out")}
    assert not paths["train"] & paths["held_out"] and len(paths["train"]) == source.items("train") > 40
    assert {d.thing.name for some in source.drawings.values() for d in some} >= {"dog food", "cow tools"}
    with pytest.raises(ValueError, match="split must be one of"):
        source.items("test")


def test_held_out_icons_are_of_another_set(tmp_path: Path) -> None:
    icons = Icons(make_packages(tmp_path))
    kinds = {split: {icon.kind for icon in icons.sets.icons[split]} for split in ("train", "held_out")}
    assert kinds == {"train": {"noto", "tabler"}, "held_out": {"fluent"}}
    picture = icons.draw(3, "held_out", random.Random(0))
    assert picture.image.mode == "RGBA" and 1 <= len(picture.turns) <= 4
    again = icons.draw(3, "held_out", random.Random(0))
    assert again.turns == picture.turns and again.image.tobytes() == picture.image.tobytes()


def test_colors_by_hand() -> None:
    colors = {
        "black": (10, 10, 12), "white": (250, 250, 250), "gray": (128, 128, 128), "red": (220, 20, 30),
        "orange": (250, 140, 10), "yellow": (250, 230, 20), "green": (30, 160, 60), "blue": (30, 60, 220),
        "purple": (130, 30, 190), "pink": (240, 60, 170), "brown": (120, 70, 30),
    }  # fmt: skip
    found = named(np.array(list(colors.values()), np.uint8))
    assert [NAMES[index] for index in found] == list(colors)
    assert named(np.array([(180, 220, 20), (224, 172, 140)], np.uint8)).tolist() == [-1, -1]  # lime, skin


def test_main_color() -> None:
    image = Image.new("RGBA", (60, 60), (220, 20, 30, 255))
    assert main_color(image) == "red"
    image.paste((30, 60, 220, 255), (0, 0, 30, 60))
    assert main_color(image) is None  # half and half
    assert main_color(Image.new("RGBA", (60, 60), (220, 20, 30, 0))) is None


def halves(mode: str = "RGB") -> Image.Image:
    """Left red, right blue."""
    image = Image.new(mode, (120, 90), "red")
    image.paste("blue", (60, 0, 120, 90))
    return image


def test_distortions_keep_what_answers_rest_on() -> None:
    """Red stays left of blue, on any background; without the promise it does not."""

    def sides(keeps: set[str], mode: str) -> tuple[int, int]:
        right = swapped = 0
        for seed in range(60):
            image = distort(Picture(halves(mode), (("?", "!"),), "name", frozenset(keeps)), random.Random(seed))
            assert image.mode == "RGB" and SHORTEST <= max(image.size) <= LONGEST and min(image.size) >= 40
            pixels = np.asarray(image).astype(int)
            x = np.arange(image.width)[None]
            red = (pixels[..., 0] - pixels[..., 1:].max(-1)).clip(60) - 60
            blue = (pixels[..., 2] - pixels[..., :2].max(-1)).clip(60) - 60
            if red.sum() and blue.sum():
                good = (red * x).sum() / red.sum() < (blue * x).sum() / blue.sum()
                right, swapped = right + good, swapped + (not good)
        return right, swapped

    everything = {COLOR, TURN, MIRROR, FRAME, DETAIL}
    assert sides(everything, "RGB") == (60, 0)
    assert sides(everything - {DETAIL}, "RGB") == (60, 0)
    assert sides({COLOR, TURN}, "RGB")[1] > 8
    right, swapped = sides({COLOR, TURN, MIRROR}, "RGBA")
    assert right > 55 and swapped <= 1  # a background of red and blue shifts a center now and then
    right, swapped = sides(set(), "RGBA")
    assert right + swapped < 56 and swapped > 5  # gray, inverted, mirrored


def test_distortions_are_determined_and_leave_some_alone() -> None:
    picture = Picture(halves(), (("?", "!"),), "name", frozenset({DETAIL}))
    images = [distort(picture, random.Random(seed)).tobytes() for seed in range(80)]
    assert images == [distort(picture, random.Random(seed)).tobytes() for seed in range(80)]
    unchanged = sum(image == halves().tobytes() for image in images)
    assert 12 <= unchanged <= 40  # a quarter at least is only given a background, of which it has one


def test_drawings_stand_out_from_backgrounds() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        gray = rng.randint(0, 255)
        drawing = Image.new("RGBA", (50, 50), (gray, gray, gray, 255))
        assert brightness(drawing) == pytest.approx(gray, abs=1)
        below = np.asarray(background((80, 60), drawing, rng).convert("L"), float)
        assert below.shape == (60, 80) and (abs(below - gray) > 40).mean() > 0.6


def test_questions_on_a_thing() -> None:
    thing = Thing("old dog", ("dog", "mammal"), "drawing")
    others = [Thing("dog house", ("house",), "drawing"), Thing("cat", ("mammal",), "drawing"), Thing("car", (), "icon")]
    seen = set()
    for seed in range(300):
        turns, kind = ask(thing, others, random.Random(seed), "red")
        seen.add(kind)
        assert 1 <= len(turns) <= 4
        for question, answer in turns:
            assert "dog house" not in question  # it shares a word
            if answer in ("yes", "no"):
                assert (answer == "yes") == ("dog" in question or "mammal" in question)
            elif kind == "choice" and (question, answer) == turns[-1]:
                assert answer == "old dog" and "an old dog" in question
            else:
                assert answer in ("old dog", "dog", "red") or "old dog" in answer
    assert seen == {"name", "choice", "yes_no", "caption"}
    assert {ask(Thing("", ("dog",), "drawing"), others, random.Random(s))[1] for s in range(20)} == {"kind"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dog", "a dog"), ("old dog", "an old dog"), ("unicorn", "a unicorn"), ("glasses", "glasses"), ("bus", "a bus"),
     ("map of Norway", "a map of Norway"), ("two of hearts", "two of hearts"), ("milk", "milk"), ("8 ball", "8 ball")],
)  # fmt: skip
def test_articles(name: str, expected: str) -> None:
    assert with_article(name) == expected


PLACED = [
    Placed(Thing("dog", ("nature",), "emoji"), 0, 0, "top left", 30, "brown"),
    Placed(Thing("sun", ("travel",), "emoji"), 2, 0, "top right", 60, "yellow"),
    Placed(Thing("key", ("object",), "emoji"), 1, 2, "bottom middle", 40, None),
    Placed(Thing("key", ("object",), "emoji"), 1, 1, "middle", 40, None),
]


def test_places() -> None:
    assert [place_of(c, r, (3, 3)) for c, r in ((0, 0), (1, 1), (1, 2))] == ["top left", "middle", "bottom middle"]
    assert [place_of(c, r, g) for c, r, g in ((1, 0, (2, 1)), (0, 1, (1, 2)), (1, 1, (2, 2)))] == [
        "right", "bottom", "bottom right",
    ]  # fmt: skip


def test_questions_on_a_grid_have_the_right_answers() -> None:
    """A second reading of each question, with the facts written by hand."""
    right = {
        "how many things are there?": "4", "count the things.": "4", "how many times is the dog shown?": "1",
        "how many times is the sun shown?": "1", "how many times is the key shown?": "2",
        "where is the dog?": "top left", "where is the sun?": "top right",
        "in which part of the picture is the dog?": "top left", "in which part of the picture is the sun?": "top right",
        "what is at the top left?": "dog", "what is at the top right?": "sun", "what is at the bottom middle?": "key",
        "what is at the middle?": "key", "is the dog to the left of the sun?": "yes",
        "is the dog to the right of the sun?": "no", "is the sun to the left of the dog?": "no",
        "is the sun to the right of the dog?": "yes", "which is larger, the dog or the sun?": "sun",
        "which is larger, the sun or the dog?": "sun", "which is smaller, the dog or the sun?": "dog",
        "which is smaller, the sun or the dog?": "dog", "what color is the dog mostly?": "brown",
        "what color is the sun mostly?": "yellow", "is there a dog in the picture?": "yes",
        "is there a sun in the picture?": "yes", "is there a key in the picture?": "yes",
        "is there a cup in the picture?": "no",
    }  # fmt: skip
    caption = "a dog at the top left, a sun at the top right, a key at the middle and a key at the bottom middle."
    assert describe(PLACED) == caption
    seen = set()
    for seed in range(600):
        turns, kind = ask_about(PLACED, Thing("cup", (), "emoji"), random.Random(seed))
        assert 1 <= len(turns) <= 4 and kind
        for question, answer in turns:
            asked = question.replace("what do you see at", "what is at")
            assert answer == (caption if kind == "caption" else right[asked]), question
            seen.add(asked)
        for earlier, later in pairwise(turns):
            assert earlier[1] != later[1]
    assert len(seen) == len(right) + 3
