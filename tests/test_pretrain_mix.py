"""The pretraining mix from made-up packages: what it writes, that it goes on, that held-out things stay out."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from commands import good, neo
from picture_builders import FEW, NAMES, make_packages
from PIL import Image

from neo_components.data import read_shards
from neo_components.data.convert.pretrain_mix import PretrainMix, complete_weights, encode
from neo_components.data.convert.pretrain_parts import write_mix
from neo_components.data.convert.pretrain_texts import KINDS, PretrainTexts
from neo_components.data.pictures.packages import PACKAGES
from neo_components.registry import PICTURES

WEIGHTS = {name: 0.0 for name in PICTURES if name not in FEW}
ONLY = [word for name in WEIGHTS for word in ("--weight", f"{name}=0")]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def mix(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix of 70 images by the command."""
    folder = tmp_path_factory.mktemp("mix") / "out"
    said = good("data", "pretrain-mix", folder, "--packages", packages, "--pairs", "70", "--held-out", "8", *ONLY,
                "--workers", "0", "--seed", "3")  # fmt: skip
    assert said.endswith(f"194 samples: {folder} (README.md is its data card)\n")
    return folder


def test_folders_and_counts(mix: Path) -> None:
    card = json.loads((mix / "card.json").read_text())
    counts = {name: sum(n["samples"] for n in found.values()) for name, found in card["folders"].items()}
    assert counts == {
        "train": 70, "train_text": 30, "validation": 70, "held_out/clip_art": 8, "held_out/icons": 8,
        "held_out/icon_scenes": 8,
    }  # fmt: skip
    assert card["seed"] == 3 and set(card["sources"]) == set(FEW)
    assert card["packages"]["noto-emoji"]["license"] == "Apache-2.0"
    samples = list(read_shards(mix / "train"))
    turns = sum(len(sample["conversations"]) // 2 for sample in samples)
    assert turns == sum(n["answers"] for n in card["folders"]["train"].values())
    readme = (mix / "README.md").read_text()
    assert "| train_text | text-spelling | 6 |" in readme and "| noto-emoji | 1.2.9 | Apache-2.0 |" in readme


def test_samples(mix: Path) -> None:
    keys = set()
    for part in ("train", "validation"):
        for sample in read_shards(mix / part):
            [data] = sample["images"]
            with Image.open(io.BytesIO(data)) as image:
                assert 64 <= max(image.size) <= 224 and image.mode in ("RGB", "P")
            texts = [turn["value"] for turn in sample["conversations"]]
            assert texts[0].startswith("<image>\n") and not any("<image>" in text for text in texts[1:])
            assert 1 <= len(texts) // 2 <= 4 and sample["source"] in FEW and all(texts)
            keys.add(sample["key"])
    assert len(keys) == 140
    for sample in read_shards(mix / "train_text"):
        assert not sample["images"] and sample["kind"] in KINDS


def test_held_out_questions_have_short_answers(mix: Path) -> None:
    for name in FEW:
        samples = list(read_shards(mix / "held_out" / name))
        assert len(samples) == 8
        for sample in samples:
            _, answer = (turn["value"] for turn in sample["conversations"])
            assert len(answer) <= 24 and sample["kind"] != "caption"


def test_the_same_seed_gives_the_same_shards_in_any_number_of_processes(
    mix: Path, packages: Path, tmp_path: Path
) -> None:
    """And an interrupted run goes on with what is there."""
    again, lines = tmp_path / "out", list[str]()
    shutil.copytree(mix / "validation", again / "validation")
    shutil.copy(mix / "mix.json", again / "mix.json")
    options = {"pairs": 70, "held_out": 8, "seed": 3, "weights": WEIGHTS}
    write_mix(again, packages, **options, workers=2, report=lines.append)  # type: ignore[arg-type]
    assert lines == ["validation: finished before"]
    for path in mix.rglob("*.*"):
        if path.name not in ("README.md", "card.json"):
            assert path.read_bytes() == (again / path.relative_to(mix)).read_bytes(), path
    with pytest.raises(FileExistsError, match="holds another mix"):
        write_mix(again, packages, **options | {"seed": 4})  # type: ignore[arg-type]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty and holds no mix"):
        write_mix(tmp_path / "full", packages)


def test_parts_and_seeds_differ(packages: Path) -> None:
    def images(**options: object) -> set[bytes]:
        made = PretrainMix(packages, 30, weights=WEIGHTS, **options)  # type: ignore[arg-type]
        return {made.sample(record)["images"][0] for record in made.records()}

    train = images()
    assert train == images() and not train & images(seed=1) and not train & images(part="validation")


def test_things_take_turns(packages: Path) -> None:
    """Each drawing is there before one is there again."""
    made = PretrainMix(packages, 200, weights={**WEIGHTS, "icons": 0, "icon_scenes": 0})
    assert [number for _, number in made.records()] == list(range(200))
    weights = complete_weights({"icons": 0, "clip_art": 7})
    assert (weights["icons"], weights["clip_art"], weights["scenes"]) == (0, 7, 1.5) and set(weights) == set(PICTURES)


def test_texts(packages: Path) -> None:
    texts = PretrainTexts(packages, 200)
    made = [texts.sample(record) for record in texts.records()]
    assert made == [texts.sample(record) for record in texts.records()]
    questions = [
        (t["value"], a["value"])
        for s in made
        for t, a in zip(s["conversations"][::2], s["conversations"][1::2], strict=True)
    ]
    sums = [
        (q.removeprefix("what is ").rstrip("?"), a) for q, a in questions if q.startswith("what is ") and " + " in q
    ]
    assert len(sums) > 5 and all(sum(map(int, q.split(" + "))) == int(a) for q, a in sums)
    spelled = [(q, a) for q, a in questions if q.startswith("spell ")]
    assert spelled and all(a.replace(" ", "") == q[6:-1] and a.replace(" ", "") in NAMES for q, a in spelled)


def test_the_packages_of_the_texts_are_looked_for_before_anything_is_written(packages: Path, tmp_path: Path) -> None:
    """Also where no source of images reads them."""
    few = tmp_path / "packages"
    few.mkdir()
    for name in ("openclipart-svg", "wonderwords"):
        (few / name).symlink_to(packages / name)
    weights = {**WEIGHTS, "icons": 0.0, "icon_scenes": 0.0}
    with pytest.raises(FileNotFoundError, match=r"fluent-emoji 1\.3\.0 is not in .*neo data pretrain-mix OUT"):
        write_mix(tmp_path / "out", few, pairs=4, held_out=0, weights=weights)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mix.json"]
    for name in PretrainTexts.needs:
        (few / name).symlink_to(packages / name)
    assert write_mix(tmp_path / "out", few, pairs=4, held_out=0, weights=weights) == 10
    assert "tabler-icons" in json.loads((tmp_path / "out" / "card.json").read_text())["packages"]
    pinned = PretrainTexts(few, 2).identity()["packages"]
    assert pinned == {name: PACKAGES[name].sha256 for name in ("fluent-emoji", "noto-emoji", "tabler-icons")}


def test_files_of_images() -> None:
    flat = Image.new("RGB", (64, 64), "red")
    assert encode(flat).startswith(b"\x89PNG")
    assert encode(Image.effect_noise((64, 64), 80).convert("RGB").resize((99, 99), Image.Resampling.BICUBIC))[:2] in (
        b"\x89P",
        b"\xff\xd8",
    )
    photo = Image.merge("RGB", [Image.linear_gradient("L").rotate(angle) for angle in (0, 90, 45)])
    assert encode(photo).startswith(b"\xff\xd8")


def test_the_commands_of_the_page(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller, and without the sources that the made-up packages have no fonts for."""
    page = (Path(__file__).parents[1] / "docs" / "pretrain_mix.md").read_text(encoding="utf-8")
    (tmp_path / "packages").symlink_to(packages)
    [example] = re.findall(r"```python\n# dots.py\n(.*?)```", page, re.DOTALL)
    (tmp_path / "dots.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    lines = [
        shlex.split(line)[1:]
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) == 3
    short = {"--pairs": "20", "--held-out": "4"}
    try:
        for words in lines:
            words = [word if word == "0" else short.get(before, word) for before, word in pairwise(["", *words])]
            good(*words[:3], "--held-out", "4", *words[3:], *ONLY, "--workers", "0")
    finally:
        PICTURES.remove("dots")
        sys.modules.pop("dots")
    assert not (tmp_path / "shards" / "drawings" / "held_out").exists()
    assert {sample["source"] for sample in read_shards("shards/mix/train")} == set(FEW)
    answers = [sample["conversations"][1]["value"] for sample in read_shards("shards/dots/held_out/dots")]
    assert answers == ["5"] * 4
    counted = json.loads(Path("shards/dots/card.json").read_text())["folders"]["train"]
    assert counted["dots"]["samples"] > 8 and sum(n["samples"] for n in counted.values()) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "with --fetch"),
        (("--weight", "icons"), "--weight must be SOURCE=NUMBER, like icons=2, got 'icons'"),
        (("--weight", "icon=2"), "did you mean 'icons'?"),
        (("--weight", "icons=-1"), "must be 0 or more, got -1.0"),
        ([word for name in PICTURES for word in ("--weight", f"{name}=0")], "must be above 0 for at least one of"),
    ],
)
def test_faults_of_the_command(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    done = neo("data", "pretrain-mix", tmp_path / "out", "--packages", tmp_path / "none", *options)
    assert done.status == 1 and message in done.err and "Traceback" not in done.err
