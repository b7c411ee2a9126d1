"""A recipe loads to its content: files, overrides, interpolation, what ships, and the reference of its keys."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
from builders import tiny_model
from recipe_texts import ASSET, MODEL, PRETRAINED, RUN, faults, written

from neo_components import load_recipe
from neo_components.components.bridge import Bridge
from neo_components.recipe import (
    Compose,
    PreBufferAsset,
    PretrainedLLM,
    RecipeError,
    copy_recipe,
    find_recipe,
    list_recipes,
    validate_recipe,
)
from neo_components.recipe.hints import hints_of, members, sections_of
from neo_components.recipe.parts import part_of
from neo_components.recipe.schema import TRAINER_OWNED, keys, schema
from neo_components.recipe.stage import Group, StageConfig

ROOT = Path(__file__).parent.parent


def test_the_content_of_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MODEL + RUN))
    assert isinstance(recipe.model, Compose)
    assert recipe.model.patch_embedding == {
        "kind": "neo", "width": 16, "patch_size": 4, "fold": 2, "channels": 3, "position": "rotary", "base": 1e4,
    }  # fmt: skip
    assert (recipe.model.pre_buffer.depth, recipe.model.post_llm.hidden_size) == (1, 32)
    assert recipe.model.rope == {"kind": "native", "base_t": 1e6, "base_h": 1e4, "base_w": 1e4}
    assert (recipe.model.attention, recipe.model.backend, recipe.model.from_pretrained) == ("mixed", "auto", None)
    assert recipe.stage.train == ("patch_embedding", "pre_buffer", "post_llm.hw")
    assert (recipe.stage.steps, recipe.stage.lr, recipe.stage.betas) == (20, 1e-3, (0.9, 0.95))
    assert [(s.shards, s.weight) for s in recipe.data["train"]] == [("folder/images", 0.7), ("folder/text", 0.3)]
    assert (recipe.data["seq_len"], recipe.data["validation"], recipe.data["seed"]) == (4096, [], 0)
    assert recipe.trainer == {"accelerator": "cpu", "gradient_clip_val": 1}
    assert (recipe.seed, recipe.output) == (0, "outputs/my")


def test_the_recipe_of_the_paper_loads_without_its_language_model(tmp_path: Path) -> None:
    text = """
model:
  patch_embedding: {width: 1024, patch_size: 16, fold: 2, position: rotary}
  pre_buffer: {depth: 12}
  post_llm: {from_pretrained: Qwen/Qwen3-1.7B-Base}
  rope: {kind: native, base_t: 1.0e6, base_h: 1.0e4, base_w: 1.0e4}
  attention: mixed
stage:
  train: [patch_embedding, pre_buffer, post_llm.hw]
"""
    recipe = load_recipe(written(tmp_path, text), overrides=["model.pre_buffer.depth=4"])
    assert isinstance(recipe.model, Compose)
    assert recipe.model.pre_buffer.depth == 4
    assert recipe.model.post_llm == PretrainedLLM(from_pretrained="Qwen/Qwen3-1.7B-Base")


def test_sections_that_a_run_needs_are_missed_by_name(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, MODEL))
    for name in ("stage", "data"):
        with pytest.raises(RecipeError, match=rf"my.yaml: {name}: a run needs this section"):
            getattr(recipe, name)


@pytest.mark.parametrize("number", ["1e-3", "'1e-3'", "1.0e-3", "0.001", "'.001'"])
def test_every_spelling_of_a_number(tmp_path: Path, number: str) -> None:
    assert load_recipe(written(tmp_path, MODEL + f"stage: {{train: [all], lr: {number}}}")).stage.lr == 0.001
    assert load_recipe(tmp_path / "my.yaml", [f"stage.lr={number}"]).stage.lr == 0.001


def test_whole_numbers_are_floats_but_not_the_other_way_round(tmp_path: Path) -> None:
    path = written(tmp_path, MODEL + "stage: {train: [all]}")
    lr = load_recipe(path, ["stage.lr=1"]).stage.lr
    assert lr == 1.0 and isinstance(lr, float)
    assert faults(path, "stage.steps=1.0e3") == [("stage.steps", "got 1000.0 (float), wanted int (a whole number)")]


def test_extends_overrides_and_interpolation(tmp_path: Path) -> None:
    written(tmp_path, "seed: 1\nvariables: {root: low}\n" + MODEL + RUN, "folder/low.yaml")
    middle = "extends: low.yaml\nseed: 2\noutput: ${variables.root}/${stage.name}\nstage: {name: middle, steps: 40}\n"
    written(tmp_path, middle, "folder/middle.yaml")
    top = "extends: folder/middle.yaml\nstage: {name: top}\ndata: {train: [{shards: '${data.tokenizer}/x'}]}\n"
    path = written(tmp_path, top)
    recipe = load_recipe(path, ["variables.root=high", "model.pre_buffer.depth=3", "data.train.0.weight=0.5"])
    assert (recipe.seed, recipe.output) == (2, "high/top")
    assert (recipe.stage.name, recipe.stage.steps, recipe.stage.lr) == ("top", 40, 1e-3)
    assert isinstance(recipe.model, Compose) and recipe.model.pre_buffer.depth == 3
    assert [(s.shards, s.weight) for s in recipe.data["train"]] == [("folder/llm/x", 0.5)]
    assert load_recipe(path, ["seed=5"]).data["seed"] == 5


def test_null_removes_what_another_file_has(tmp_path: Path) -> None:
    written(tmp_path, MODEL, "low.yaml")
    sizes = ("vocab_size", "depth", "hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size")
    gone = ", ".join(f"{name}: null" for name in sizes)
    path = written(tmp_path, f"extends: low.yaml\nmodel: {{post_llm: {{from_pretrained: a/b, {gone}}}}}\n")
    model = load_recipe(path).model
    assert isinstance(model, Compose) and model.post_llm == PretrainedLLM(from_pretrained="a/b")


def test_the_environment_is_text_not_another_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "a/${seed}")
    recipe = load_recipe(written(tmp_path, MODEL + "output: ${oc.env:FOLDER}"))
    assert recipe.output == "a/${seed}"
    assert load_recipe(written(tmp_path, recipe.to_yaml(), "again.yaml")) == recipe


FORMS = {
    "from scratch": MODEL + RUN,
    "model only": MODEL,
    "pretrained": PRETRAINED + "  \nstage: {train: [all], lr: '3e-4'}",
    "asset": ASSET.replace("not/there}, post", "a/b, reset: true}, rope: 1d, bridge: random, post"),
    "checkpoint": "model: {from_pretrained: a/b, backend: eager}\n" + RUN,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_complete_recipe_loads_to_the_same_recipe(tmp_path: Path, form: str) -> None:
    recipe = load_recipe(written(tmp_path, FORMS[form]), ["seed=7"])
    again = load_recipe(written(tmp_path, recipe.to_yaml(), "again.yaml"))
    assert again == recipe
    assert again.seed == 7 and again != load_recipe(tmp_path / "my.yaml")
    assert [line for line in recipe.to_yaml().splitlines()[1:] if line] == again.to_yaml().splitlines()[1:]


SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_that_ships_is_valid_and_complete(tmp_path: Path, path: Path) -> None:
    name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    assert validate_recipe(name) == []
    recipe = load_recipe(name)
    assert recipe.stage.steps > 0 and recipe.data["train"]
    assert load_recipe(written(tmp_path, recipe.to_yaml())) == recipe


def test_recipes_that_ship_are_listed_with_what_they_do() -> None:
    listed = list_recipes()
    assert SHIPPED and [recipe.path for recipe in listed] == SHIPPED
    assert all(len(recipe.summary) > 10 and "#" not in recipe.summary for recipe in listed)
    assert [find_recipe(recipe.name) for recipe in listed] == SHIPPED
    assert find_recipe(f"{listed[0].name}.yaml") == SHIPPED[0]
    written_there = {recipe.name: recipe.summary for recipe in listed}
    assert "the LLM is frozen. Images have open questions only, " in written_there["quickstart/pretrain"]
    assert written_there["quickstart/pretrain"].endswith("30 % is text of all kinds.")


def test_an_unknown_recipe_proposes_the_nearest() -> None:
    name = list_recipes()[0].name
    with pytest.raises(FileNotFoundError, match=rf"nearest: {name} \(neo recipes lists all\)"):
        load_recipe(name + "x")


def test_a_copy_brings_what_it_extends_and_overwrites_nothing(tmp_path: Path) -> None:
    written(tmp_path, MODEL, "low.yaml")
    path = written(tmp_path, "# what: mine\nextends: ../low.yaml\nseed: 3\n", "sub/top.yaml")
    copy = copy_recipe(path, tmp_path / "other" / "place" / "run.yaml")
    assert copy.read_text() == path.read_text()
    assert (tmp_path / "other" / "low.yaml").read_text() == MODEL
    assert load_recipe(copy) == load_recipe(path, [f"output=outputs/{copy.stem}"])
    with pytest.raises(ValueError, match="exists already; remove it or give another destination"):
        copy_recipe(path, copy)
    assert copy_recipe(list_recipes()[0].name, tmp_path / "new") == tmp_path / "new" / SHIPPED[0].name


def test_stage_groups_are_those_of_the_model() -> None:
    model = tiny_model()
    model.bridge_in = Bridge(32, 32)
    assert set(get_args(Group)) == {*model.groups(), "visual_experts", "all"}  # only a model with experts has those


def test_a_stage_in_python_lists_all_that_is_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"stage.steps: got 0, .*; stage.log_every: got 0, .*; stage.betas: got"):
        StageConfig(train=("all",), steps=0, log_every=0, betas=(0.9, 2.0))


ROW = re.compile(r"^\| `([\w.\[\]]+)` \| [^|]+ \| (?:`([^`]*)`|(\w+)) \|", re.MULTILINE)


def defaults(section: Any, prefix: str = "") -> dict[str, set[str]]:
    """Dotted key -> its default as the page writes it; a key that two forms of a section share may have two."""
    found: dict[str, set[str]] = {}
    for column in fields(section):
        hint, key = hints_of(section)[column.name], prefix + column.name
        needed = column.default is MISSING and column.default_factory is MISSING
        value = column.default if column.default is not MISSING else needed or column.default_factory()
        text = (
            {True: "true", False: "false", None: "null"}.get(value, str(value))
            if isinstance(value, bool | None)
            else value
        )
        shown = (
            "required"
            if needed
            else "empty"
            if value in ("", [], {})
            else str(list(text) if isinstance(text, tuple) else text)
        )
        found.setdefault(key, set()).add(shown)
        for part in filter(None, map(part_of, members(hint))):
            for form in map(part.form, part.names()):
                for name, values in defaults(form, f"{key}.").items():
                    found.setdefault(name, set()).update(values)
            found[f"{key}.kind"] = {part.default}
        items = [inner for item in get_args(hint) for inner in sections_of(item)] if "list" in str(hint) else []
        for inner, part in [(i, f"{key}.") for i in sections_of(hint)] + [(i, f"{key}[].") for i in items]:
            for name, values in defaults(inner, part).items():
                found.setdefault(name, set()).update(values)
    return found


def test_the_reference_has_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "reference" / "recipe.md").read_text()
    written_there: dict[str, set[str]] = {}
    for key, quoted, word in ROW.findall(page):
        written_there.setdefault(key, set()).add(quoted or word)
    expected = {key: values for key, values in defaults(schema()).items() if not key.startswith("trainer.")}
    expected["output"] = {"outputs/NAME"}
    assert set(expected) == {key for key in keys() if not key.startswith("trainer.")}
    assert written_there == expected
    assert set(re.findall(r"^\| `trainer\.(\w+)` \| ", page, re.MULTILINE)) == set(TRAINER_OWNED)


def test_the_example_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL)
    recipe = load_recipe(written(tmp_path, example))
    assert isinstance(recipe.model, Compose) and not isinstance(recipe.model.pre_buffer, PreBufferAsset)
    assert recipe.data["train"][0].shards == "/data/shards/images"
