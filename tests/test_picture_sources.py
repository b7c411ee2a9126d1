"""Drawn sources of pictures: text, scenes, charts, tables, formulas, documents, easy-VQA."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from picture_packages import stand_ins
from PIL import Image

from neo_components.data.pictures import palette
from neo_components.data.pictures.chart_data import ChartData, clear_extreme
from neo_components.data.pictures.chart_drawing import STYLES, Canvas, bars, pie
from neo_components.data.pictures.chart_questions import chart_turns
from neo_components.data.pictures.charts import KINDS
from neo_components.data.pictures.documents import Page, _receipt
from neo_components.data.pictures.easy_vqa import read_easy_vqa
from neo_components.data.pictures.fonts import CAPITALS_ONLY, FAMILIES, NEVER_IN_TRAINING, Face, Fonts
from neo_components.data.pictures.formula_layout import Part, lay_out
from neo_components.data.pictures.formulas import KINDS as FORMULAS
from neo_components.data.pictures.formulas import formula
from neo_components.data.pictures.picture import (
    COLOR,
    DETAIL,
    FRAME,
    HELD_OUT,
    MIRROR,
    TRAIN,
    TURN,
    Picture,
    PictureSource,
)
from neo_components.data.pictures.scene_questions import _relation, count_turn
from neo_components.data.pictures.scenes import crowd, distinct, placed, render
from neo_components.data.pictures.shapes import HELD_OUT_PAIRS, PAIRS, SHAPES, Thing
from neo_components.data.pictures.sheets import write
from neo_components.data.pictures.tables import Table, random_table, table_turns
from neo_components.data.pictures.words import Words
from neo_components.data.skip_counts import SampleError
from neo_components.registry import PICTURES

SOURCES = ("lettering", "handwriting", "scenes", "easy_vqa", "charts", "tables", "formulas", "documents")
DRAWN = 60
WHITE = (255, 255, 255)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_ins(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def sources(packages: Path) -> dict[str, PictureSource]:
    return {name: PICTURES[name](packages) for name in SOURCES}


@pytest.fixture(scope="module")
def drawn(sources: dict[str, PictureSource]) -> dict[str, list[Picture]]:
    return {name: [draw(source, number) for number in range(DRAWN)] for name, source in sources.items()}


@pytest.fixture
def face(packages: Path) -> Face:
    return Fonts(packages).faces("roboto")[0]


def draw(source: PictureSource, number: int, split: str = TRAIN) -> Picture:
    return source.draw(number, split, random.Random(f"{type(source).__name__} {split} {number}"))


@pytest.mark.parametrize("name", SOURCES)
def test_pictures_and_questions_have_their_form(name: str, drawn: dict[str, list[Picture]]) -> None:
    for picture in drawn[name]:
        assert picture.image.mode == "RGB"
        assert 48 <= max(picture.image.size) <= 224
        assert 1 <= len(picture.turns) <= 4
        assert len({question for question, _ in picture.turns}) == len(picture.turns)
        assert all(question[-1] in "?." and answer == answer.strip() != "" for question, answer in picture.turns)
        assert picture.keeps <= {COLOR, TURN, MIRROR, FRAME, DETAIL}
        asked = " ".join(question for question, _ in picture.turns)
        assert COLOR in picture.keeps or "color" not in asked or name == "documents"  # which print that word


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("split", [TRAIN, HELD_OUT])
def test_a_number_gives_the_same_picture(name: str, split: str, packages: Path) -> None:
    one, other = PICTURES[name](packages), PICTURES[name](packages)
    for number in (3, 11):
        first, second = draw(one, number, split), draw(other, number, split)
        assert first.turns == second.turns and first.keeps == second.keeps
        assert first.image.tobytes() == second.image.tobytes()
    assert draw(one, 3, split).image.tobytes() != draw(one, 4, split).image.tobytes()


def test_questions_alone_do_not_give_the_answers(drawn: dict[str, list[Picture]]) -> None:
    """Yes and no are equally frequent, and the most frequent answer of a question is rare enough."""
    turns = [turn for pictures in drawn.values() for picture in pictures for turn in picture.turns]
    answers = Counter(answer for _, answer in turns)
    assert 0.44 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.56
    by_question: dict[str, Counter[str]] = {}
    for question, answer in turns:
        by_question.setdefault(question, Counter())[answer] += 1
    often = [counts for counts in by_question.values() if counts.total() >= 5]
    assert len(often) > 20
    assert sum(max(counts.values()) for counts in often) / sum(counts.total() for counts in often) < 0.45


def test_families_of_fonts_are_held_out(packages: Path) -> None:
    fonts = Fonts(packages)
    train, held_out = fonts.families(TRAIN), fonts.families(HELD_OUT)
    assert (len(train), len(held_out)) == (74, 11)
    assert set(train).isdisjoint(held_out) and set(held_out) == NEVER_IN_TRAINING
    assert all(NEVER_IN_TRAINING.intersection(names) for names in FAMILIES.values())
    picked = {fonts.pick(random.Random(number), TRAIN).family for number in range(1000)}
    assert picked == set(train)
    plain = {fonts.pick_plain(random.Random(number), TRAIN).family for number in range(300)}
    assert plain.isdisjoint(CAPITALS_ONLY) and len(plain) > 40


@pytest.mark.parametrize(("missing", "source"), [("fontpkg-caveat", "formulas"), ("wonderwords", "tables")])
def test_a_missing_package_is_named(missing: str, source: str, packages: Path, tmp_path: Path) -> None:
    for package in packages.iterdir():
        if package.name != missing:
            (tmp_path / package.name).symlink_to(package)
    with pytest.raises(FileNotFoundError, match=rf"{missing} .*neo data pretrain-mix OUT .*--fetch"):
        PICTURES[source](tmp_path)
    (tmp_path / missing).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"; remove .*{missing} .*--fetch"):
        PICTURES[source](tmp_path)


def test_things_that_find_no_room_are_refused() -> None:
    """Instead of one that lies on another; that is rare."""
    with pytest.raises(SampleError, match="40 things find no room in a scene"):
        placed(random.Random(0), [("red", "circle")] * 40, WHITE)
    refused = 0
    for seed in range(500):
        try:
            things = placed(random.Random(seed), [("red", "circle")] * 8, WHITE)
        except SampleError:
            refused += 1
            continue
        pairs = combinations(things, 2)
        assert all(math.hypot(a.x - b.x, a.y - b.y) > 0.75 * (a.half + b.half) for a, b in pairs)
    assert refused < 10


def test_an_unknown_split_is_refused(sources: dict[str, PictureSource]) -> None:
    for source in sources.values():
        with pytest.raises(ValueError, match="split must be one of train, held_out, got 'test'"):
            source.items("test")


def test_words(packages: Path) -> None:
    words = Words(packages)
    assert "needle" not in words.nouns and "ladder" in words.nouns  # the first is on the list of profanity
    rng = random.Random(0)
    for _ in range(200):
        assert words.similar(rng, "LADDER") != "LADDER"
        assert words.similar(rng, "LADDER").isupper()


def test_text_is_where_it_is_said_to_be(face: Face) -> None:
    """The middle of the ink, found in the pixels, is that of the sheet."""
    for seed in range(40):
        sheet = write(random.Random(seed), face, "Hand")
        pixels = np.asarray(sheet.image, dtype=int)
        corner = pixels[0, 0]
        rows, columns = np.nonzero(np.abs(pixels - corner).sum(-1) > 150)
        height, width = pixels.shape[:2]
        assert abs((columns.min() + columns.max() + 1) / 2 / width - sheet.x) < 0.05
        assert abs((rows.min() + rows.max() + 1) / 2 / height - sheet.y) < 0.06


def test_ink_stands_out() -> None:
    rng = random.Random(0)
    for _ in range(300):
        ink, ink_rgb, ground, ground_rgb = palette.pair(rng)
        assert ink != ground and palette.contrast(ink_rgb, ground_rgb) >= 2.5
    assert palette.contrast((0, 0, 0), WHITE) == pytest.approx(21)
    assert palette.luminance((255, 0, 0)) == pytest.approx(0.2126)


def test_letters_are_counted(drawn: dict[str, list[Picture]]) -> None:
    """Where a word is both read off and counted the answers agree."""
    checked = 0
    for picture in drawn["lettering"]:
        answers = dict(picture.turns)
        counts = [answer for question, answer in answers.items() if "letters" in question]
        words = [answer for question, answer in answers.items() if question.startswith(("what word", "read the word"))]
        if counts and words:
            assert counts[0] == str(len(words[0]))
            checked += 1
    assert checked >= 1


def test_held_out_pairs_never_occur_in_training(sources: dict[str, PictureSource]) -> None:
    assert len(PAIRS) == 144 and 26 <= len(HELD_OUT_PAIRS) <= 30
    assert {shape for _, shape in HELD_OUT_PAIRS} == set(SHAPES) - {"circle", "rectangle", "triangle"}
    train = set(PAIRS) - HELD_OUT_PAIRS
    assert {color for color, _ in train} == set(palette.NAMES) and {shape for _, shape in train} == set(SHAPES)
    for number in range(2000):
        rng = random.Random(number)
        things = distinct(rng, TRAIN, WHITE, rng.randint(1, 4)) if number % 2 else crowd(rng, TRAIN, WHITE)[0]
        assert HELD_OUT_PAIRS.isdisjoint((thing.color, thing.shape) for thing in things)
        things = distinct(rng, HELD_OUT, WHITE, 2)
        assert HELD_OUT_PAIRS.intersection((thing.color, thing.shape) for thing in things)
    # Nor are they named: "is there a ...?" answered by no would give them away.
    names = re.compile("|".join(f"{color} {shape}(s|es)?\\b" for color, shape in sorted(HELD_OUT_PAIRS)))
    for number in range(200):
        assert not names.search(str(draw(sources["scenes"], number).turns))


def test_counts_are_what_is_drawn() -> None:
    answers: Counter[str] = Counter()
    for seed in range(400):
        things, (question, answer) = crowd(random.Random(seed), TRAIN, WHITE)
        assert 1 <= len(things) <= 8
        shape = next((one for one in sorted(SHAPES, key=len, reverse=True) if one in question), None)
        color = next((one for one in palette.NAMES if f" {one} " in question), None)
        assert shape or color
        found = [t for t in things if (shape in (None, t.shape)) and (color in (None, t.color))]
        assert answer == str(len(found)), question
        answers[answer] += 1
    assert set(answers) == set("0123456") and max(answers.values()) < 0.22 * 400


def test_relations_are_those_of_the_places() -> None:
    seen: Counter[str] = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        things = distinct(rng, TRAIN, WHITE, 3)
        by_name = {thing.name: thing for thing in things}
        turn = _relation(rng, things, PAIRS)
        if turn is None:
            continue
        found = re.fullmatch("is the (.+?) (to the left of|to the right of|above|below) the (.+)\\?", turn[0])
        assert found
        one, other = by_name[found[1]], by_name[found[3]]
        truth = {
            "to the left of": one.x < other.x, "to the right of": one.x > other.x, "above": one.y < other.y,
            "below": one.y > other.y,
        }[found[2]]  # fmt: skip
        assert turn[1] == ("yes" if truth else "no")
        seen[turn[1]] += 1
    assert min(seen.values()) > 100


def test_a_shape_is_drawn_where_it_is() -> None:
    thing = Thing("red", "square", "filled", 0.25, 0.75, 0.1, (220, 30, 30))
    image = np.asarray(render(random.Random(0), [thing], WHITE))
    side = image.shape[0]
    rows, columns = np.nonzero((image == (220, 30, 30)).all(-1))
    assert (rows.mean() / side, columns.mean() / side) == pytest.approx((0.75, 0.25), abs=0.02)
    # A square of 0.85 of its half: (2 x 0.085) of the side squared.
    assert len(rows) / side**2 == pytest.approx(0.17**2, rel=0.12)
    assert count_turn(random.Random(0), "both", ("red", "square"), [thing])[1] == "1"


def canvas(face: Face, side: int = 320) -> Canvas:
    return Canvas(Image.new("RGB", (side, side), WHITE), face, 20, WHITE, (0, 0, 0), grid=False)


def colored(image: Image.Image, rgb: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == rgb).all(-1).sum())


def chart_data(values: list[int], printed: bool = False) -> ChartData:
    colors = [("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))]
    return ChartData("", ["A", "B", "C"], [""], [values], 100, colors, True, printed)


@pytest.mark.parametrize("upright", [True, False])
def test_bars_are_as_long_as_their_values(upright: bool, face: Face) -> None:
    page, data = canvas(face), chart_data([80, 40, 20])
    bars(page, data, upright)
    areas = [colored(page.image, rgb) for _, rgb in data.colors]
    assert areas[0] / areas[1] == pytest.approx(2, rel=0.05)
    assert areas[1] / areas[2] == pytest.approx(2, rel=0.05)


def test_slices_are_as_large_as_their_values(face: Face) -> None:
    page, data = canvas(face, 400), chart_data([50, 30, 20])
    pie(page, data)
    areas = np.array([colored(page.image, rgb) for _, rgb in data.colors])
    assert areas / areas.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


def test_answers_about_charts() -> None:
    data = chart_data([80, 40, 20], printed=True)
    answers: dict[str, str] = {}
    for seed in range(200):
        for part in chart_turns(random.Random(seed), "bar", data):
            answers |= dict(part)
    assert answers["which bar is the highest?"] == "A" and answers["which bar is the lowest?"] == "C"
    assert answers["what is the value of B?"] == "40" and answers["how many bars are there?"] == "3"
    assert answers["is A higher than C?"] == "yes" and answers["is C higher than B?"] == "no"
    assert answers["what color is the highest bar?"] == "red" and answers["which category is blue?"] == "C"
    assert clear_extreme([80, 78, 20], 100, largest=True) is None
    assert clear_extreme([80, 78, 20], 100, largest=False) == 2


def test_styles_of_charts_are_held_out() -> None:
    assert set(KINDS[HELD_OUT]).isdisjoint(KINDS[TRAIN])
    assert set(KINDS[HELD_OUT]) == {"donut", "stacked bar", "dot"}
    assert {*KINDS[TRAIN], *KINDS[HELD_OUT]} == {*STYLES, "scatter"}


def test_answers_about_tables(packages: Path) -> None:
    table = Table("city", ["Rome", "Oslo"], ["cost", "wins"], [[3, 40], [7, 12]])
    answers: dict[str, str] = {}
    for seed in range(200):
        for part in table_turns(random.Random(seed), table):
            answers |= dict(part)
    assert answers["what is the wins of Oslo?"] == "12" and answers["which row has 7 under cost?"] == "Oslo"
    assert (
        answers["which row has the largest wins?"] == "Rome" and answers["which row has the smallest cost?"] == "Rome"
    )
    assert answers["is the cost of Oslo larger than that of Rome?"] == "yes"
    assert answers["how many columns are there?"] == "3" and answers["what is the last column called?"] == "wins"
    made = random_table(random.Random(5), Words(packages))
    for column in zip(*made.cells, strict=True):
        assert len(set(column)) == len(made.rows)


def test_totals_are_sums(packages: Path) -> None:
    for seed in range(50):
        page = Page("Bill")
        _receipt(random.Random(seed), page, Words(packages))
        amounts = [round(100 * float(right)) for _, right in page.lines if right]
        assert sum(amounts[:-1]) == amounts[-1]
        assert page.first[0][1] == page.lines[-1][1]


def text(value: str) -> Part:
    return Part("text", value)


def test_formulas_are_laid_out(face: Face) -> None:
    """A fraction is higher than its parts, a power reaches higher and an index lower than its base, a root encloses."""
    plain = lay_out(text("x"), face, 40)
    power = lay_out(Part("power", parts=(text("x"), text("2"))), face, 40)
    index = lay_out(Part("index", parts=(text("x"), text("2"))), face, 40)
    fraction = lay_out(Part("fraction", parts=(text("x"), text("2"))), face, 40)
    root = lay_out(Part("root", parts=(text("x"),)), face, 40)
    assert power.base - plain.base > 8 and power.mask.height - power.base == plain.mask.height - plain.base
    assert index.mask.height - index.base > plain.mask.height - plain.base + 4
    assert fraction.mask.height > 1.8 * plain.mask.height
    assert root.mask.width > plain.mask.width + 15 and root.base > plain.base
    row = np.asarray(fraction.mask)[:, fraction.mask.width // 2] > 0
    assert np.asarray(fraction.mask)[fraction.base - 12].min() == 255 and row.sum() > 3
    with pytest.raises(ValueError, match="cannot be of kind 'matrix'"):
        lay_out(Part("matrix"), face, 40)


def written(part: Part) -> str:
    """What a formula is made of, in the order of its parts."""
    return part.text + "".join(written(one) for one in part.parts)


@pytest.mark.parametrize("kind", FORMULAS)
def test_formulas_are_read_off(kind: str) -> None:
    """The signs of the text are those of the formula, but for what stands for its layout."""
    for seed in range(40):
        part, read = formula(random.Random(seed), kind)
        shown = written(part).replace("\u2212", "-").replace(" ", "")
        bare = re.sub(r"sqrt|[()^_/ ]|\.\.", "", read)
        assert sorted(bare) == sorted(shown), (read, shown)


def test_easy_vqa_splits(sources: dict[str, PictureSource]) -> None:
    source = sources["easy_vqa"]
    assert (source.items(TRAIN), source.items(HELD_OUT)) == (4000, 1000)
    test = read_easy_vqa("test")
    for number in range(50):
        picture = draw(source, number, HELD_OUT)
        assert set(picture.turns) <= set(test[number].questions)
        with Image.open(test[number].path) as image:
            assert picture.image.tobytes() == image.convert("RGB").tobytes()
    answers = Counter(answer for number in range(700) for _, answer in draw(source, number).turns)
    assert 0.46 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.54
    asked = Counter(
        (" no" in question, answer)
        for number in range(700)
        for question, answer in draw(source, number).turns
        if answer in ("yes", "no")
    )
    assert 0.4 < asked[True, "yes"] / (asked[True, "yes"] + asked[True, "no"]) < 0.6
