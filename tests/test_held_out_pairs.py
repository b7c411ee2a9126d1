"""Held-out pairs of color and shape: no source of the train split names or draws one; what distortions must keep."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from picture_builders import COLORS, make_packages, rdf, svg, write
from picture_packages import stand_ins
from PIL import Image

from neo_components.data.convert.pretrain_mix import PretrainMix
from neo_components.data.convert.pretrain_texts import PretrainTexts
from neo_components.data.pictures.clip_art import ClipArt, is_held_out
from neo_components.data.pictures.held_out_pairs import held_out_colors, names_held_out, refuse_held_out
from neo_components.data.pictures.icons import _INKS, Icons, inks
from neo_components.data.pictures.naming import keeps_of
from neo_components.data.pictures.picture import COLOR, HELD_OUT, MIRROR, TRAIN, TURN
from neo_components.data.pictures.shapes import HELD_OUT_PAIRS
from neo_components.data.skip_counts import SampleError
from neo_components.registry import PICTURES

NAMES = ("orange-heart", "white-large-square", "purple-square", "green-heart", "red-apple", "star", "cross", "arrow")
SHAPES = ("star", "cross", "arrow-up", "heart", "square", "pentagon")
PAIR = re.compile(
    "|".join(rf"\b{color} (large |small |medium )*{shape}(s|es)?\b" for color, shape in sorted(HELD_OUT_PAIRS))
)
DOUBLE = re.compile(r"\b(red|green|blue|yellow|orange|purple|pink|brown|gray|black|white) (red|green)\b")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All packages, with names and drawings of held-out pairs among them: stars are green, arrows orange."""
    folder = make_packages(tmp_path_factory.mktemp("packages"))
    for font in stand_ins(tmp_path_factory.mktemp("fonts")).glob("fontpkg-*"):
        (folder / font.name).symlink_to(font)
    fills = dict(
        zip(NAMES, ("orange", "white", "purple", "green", "red", "#1f8a3a", "#d42020", "#f08010"), strict=True)
    )
    noto = json.loads((folder / "noto-emoji" / "icons.json").read_text())
    for name, fill in fills.items():
        noto["icons"][name] = {"body": f'<rect width="128" height="128" fill="{fill}"/>'}
        write(folder / "fluent-emoji" / "icons" / "flat" / f"{name}.svg", svg(fill, 'viewBox="0 0 32 32"'))
    write(folder / "noto-emoji" / "icons.json", json.dumps(noto))
    categories = json.loads((folder / "noto-emoji" / "metadata.json").read_text())
    categories["categories"]["Activities"] = NAMES
    write(folder / "noto-emoji" / "metadata.json", json.dumps(categories))
    lines = json.loads((folder / "tabler-icons" / "icons.json").read_text())
    line = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" stroke="currentColor"><path d="M2 9h9v9z"/></svg>'
    )
    for name in SHAPES:
        lines[name] = {"category": "Shapes", "styles": {"outline": {}}}
        write(folder / "tabler-icons" / "icons" / "outline" / f"{name}.svg", line)
    write(folder / "tabler-icons" / "icons.json", json.dumps(lines))
    for number in range(8):
        for name, fill in (("green_star", "#1f8a3a"), ("star", "#1f8a3a"), ("star_food", "#d42020")):
            title = rdf(name.replace("_", " "), "star")
            size = f'width="{60 + number}" height="{len(name) + 30}"'
            write(folder / "openclipart-svg" / "food" / f"{name}_ann_{number}.svg", svg(fill, size, title))
    words = folder / "wonderwords" / "wonderwords" / "assets" / "adjectivelist.txt"
    words.write_text(words.read_text() + "\n" + "\n".join((*COLORS, "star")))
    return folder


def text_of(turns: Sequence[tuple[str, str]]) -> str:
    return " ".join(text for turn in turns for text in turn).lower()


def test_pairs_in_names() -> None:
    assert held_out_colors("broken heart") == {"orange", "purple", "white"} == held_out_colors("arrows up")
    assert held_out_colors("half circle") == {"brown", "cyan", "green"} and not held_out_colors("circle")
    named = ["white large square", "green stars", "cross in orange"]
    assert all(map(names_held_out, named)) and not any(map(names_held_out, ["green heart", "orange", "heart", "white"]))


def test_drawings_of_pairs_are_refused() -> None:
    button = Image.new("RGBA", (60, 60), (30, 60, 220, 255))
    refuse_held_out("arrow", button)
    button.paste((250, 250, 250, 255), (10, 10, 40, 30))  # a sixth of it
    with pytest.raises(SampleError, match="'up arrow' in white is a held-out pair"):
        refuse_held_out("up arrow", button)
    refuse_held_out("star", button)


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_no_source_names_a_held_out_pair_in_training(name: str, packages: Path) -> None:
    source, drawn = PICTURES[name](packages), 0
    for number in range(60):
        try:
            picture = source.draw(number, TRAIN, random.Random(f"{name} {number}"))
        except SampleError:
            continue
        drawn += 1
        assert not PAIR.search(text_of(picture.turns)), picture.turns
    assert drawn > 30


def test_icons_and_drawings_of_training(packages: Path) -> None:
    icons = Icons(packages).sets
    names = {split: {icon.thing.name for icon in icons.icons[split]} for split in (TRAIN, HELD_OUT)}
    assert {"orange heart", "white large square", "purple square"} == names[HELD_OUT] - names[TRAIN]
    assert {"green heart", "star", "red apple"} <= names[TRAIN]
    seen = set()
    for icon in icons.icons[TRAIN]:
        for seed in range(40 if icon.thing.name in ("star", "cross", "arrow", "arrow up") else 0):
            rng = random.Random(seed)
            try:
                _, color = icons.render(icon, 64, rng)
            except SampleError:
                assert (icon.thing.name, icon.kind) in {("star", "noto"), ("arrow", "noto")}
                continue
            assert (color, icon.thing.name.removesuffix(" up")) not in HELD_OUT_PAIRS
            seen.add((color, icon.thing.name, icon.kind))
    assert {color for color, name, kind in seen if (name, kind) == ("star", "tabler")} == {
        "black", "red", "blue", "orange", "purple", "gray", "pink", "white", "yellow"
    }  # fmt: skip
    assert inks("dog") == list(_INKS) and ("red", "cross", "noto") in seen
    fluent = next(icon for icon in icons.icons[HELD_OUT] if icon.thing.name == "star")
    assert icons.render(fluent, 64, random.Random(0))[1] == "green"


def test_clip_art_of_training(packages: Path) -> None:
    source = ClipArt(packages)
    named = {drawing.thing.name for drawing in source.drawings[TRAIN]}
    assert "green star" not in named and {"star", "star food"} <= named
    refused = 0
    for number, drawing in enumerate(source.drawings[TRAIN]):
        if drawing.thing.name == "star":
            with pytest.raises(SampleError, match="in green is a held-out pair"):
                source.draw(number, TRAIN, random.Random(number))
            refused += 1
        elif drawing.thing.name == "star food":
            assert source.draw(number, TRAIN, random.Random(number)).turns
    assert refused == sum(not is_held_out(f"food/star_ann_{number}.svg") for number in range(8)) > 0


def test_texts_name_no_held_out_pair(packages: Path) -> None:
    texts = PretrainTexts(packages, 2000)
    scenes = 0
    for record in texts.records():
        sample = texts.sample(record)
        said = " ".join(turn["value"] for turn in sample["conversations"])
        assert not PAIR.search(said), said
        if sample["kind"] == "scenes":
            scenes += "star" in said
            assert not DOUBLE.search(said), said
    assert scenes > 30


@pytest.mark.parametrize(
    ("name", "kinds", "turns", "keeps"),
    [
        ("dog", ("animal",), [("what is this?", "dog")], set()),
        ("dog", ("animal",), [("what is its main color?", "red")], {COLOR}),
        ("dog", ("animal",), [("is this a green apple?", "no")], {COLOR}),
        ("red apple", ("food or drink",), [("what is this?", "red apple")], {COLOR}),
        ("heart", ("shape",), [], {COLOR}),
        ("flag of France", ("flag",), [], {COLOR, TURN, MIRROR}),
        ("semaphore b", ("semaphore signal",), [], {COLOR, TURN, MIRROR}),
        ("first quarter moon", ("travel",), [], {COLOR, TURN, MIRROR}),
        *((name, ("object",), [], {TURN, MIRROR}) for name in (
            "letter p", "fast forward button", "fast reverse button", "next track button", "last track button",
            "math greater", "sort ascending", "player skip forward", "index pointing left", "layout sidebar right",
            "map of Norway", "eight oclock", "2 columns",
        )),
    ],
)  # fmt: skip
def test_what_distortions_must_keep(
    name: str, kinds: tuple[str, ...], turns: list[tuple[str, str]], keeps: set[str]
) -> None:
    assert keeps_of(name, kinds, turns) == keeps


@pytest.mark.parametrize("name", ["icons", "icon_scenes"])
def test_a_color_that_is_named_is_kept(name: str, packages: Path) -> None:
    """Also where the question names it and the answer is no."""
    source, colored = PICTURES[name](packages), 0
    for number in range(100):
        try:
            picture = source.draw(number, TRAIN, random.Random(f"{name} {number}"))
        except SampleError:
            continue
        if re.search(r"\b(red|green|blue|yellow)\b", text_of(picture.turns)):
            colored += 1
            assert COLOR in picture.keeps
    assert colored > 10


def test_a_mix_without_held_out_things_is_refused(packages: Path) -> None:
    class Endless(PICTURES["scenes"]):  # type: ignore[misc]
        def items(self, split: str) -> int:
            return 9 if split == TRAIN else 0

    PICTURES.register("endless")(Endless)
    try:
        only = {name: float(name == "endless") for name in PICTURES}
        with pytest.raises(ValueError, match="must be above 0 for a source with a held-out part"):
            PretrainMix(packages, 5, HELD_OUT, weights=only)
        assert PretrainMix(packages, 5, TRAIN, weights=only).weights == {"endless": 1.0}
    finally:
        PICTURES.remove("endless")
