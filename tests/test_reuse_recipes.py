"""The recipes that attach an asset, each built and stepped on a small asset, language model and data."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import same_tensors
from commands import SIDE, good

from neo_components import NEO, PreBuffer
from neo_components.recipe import list_recipes, validate_recipe
from neo_components.storage.weights import read_json

SHORT = [
    "stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "stage.checkpoint_every=2", "data.workers=0",
    "data.seq_len=256", f"data.min_pixels={SIDE**2}", f"data.max_pixels={SIDE**2}",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the quickstart's to these recipes."""
    root = tmp_path_factory.mktemp("reuse")
    good("export", world / "neo", "-o", root / "pre_buffer")
    (root / "llm_b").symlink_to(world / "other")
    (root / "shards").mkdir()
    for name in ("train_all", "validation"):
        (root / "shards" / name).symlink_to(world / "shards")
    for name in ("stage1", "stage2", "bridges", "frozen"):
        good("train", f"reuse/{name}", f"variables.root={root}", *SHORT)
    good("train", "reuse/real_llm", f"variables.root={root}", f"variables.llm={root / 'llm_b'}", *SHORT)
    return root


def test_these_are_all() -> None:
    assert {r.name for r in list_recipes() if r.name.startswith("reuse/")} == {
        "reuse/stage1", "reuse/stage2", "reuse/bridges", "reuse/frozen", "reuse/real_llm"
    }  # fmt: skip


def test_what_each_recipe_trains(root: Path) -> None:
    one, two, only = (NEO.from_pretrained(root / f"reuse_{name}" / "neo") for name in ("stage1", "stage2", "bridges"))
    asset = PreBuffer.from_pretrained(root / "pre_buffer")
    assert (one.text, two.text, only.text) == ("shared", "shared", "bypass")
    assert only.bridge_in is None and one.bridge_in is not None
    for model in (one, only):
        assert same_tensors(model.pre_buffer.state_dict(), asset.state_dict())
    assert not same_tensors(two.pre_buffer.state_dict(), asset.state_dict())
    fresh = root / "llm_b" / "model.safetensors"
    assert fresh.is_file() and torch.equal(one.post_llm.norm.weight, only.post_llm.norm.weight)
    assert not any(t.any() for n, t in only.post_llm.state_dict().items() if "k_proj_hw" in n)
    assert any(t.any() for n, t in one.post_llm.state_dict().items() if "k_proj_hw" in n)
    frozen = NEO.from_pretrained(root / "reuse_frozen" / "neo")
    assert frozen.text == "bypass" and same_tensors(frozen.pre_buffer.state_dict(), asset.state_dict())
    assert not torch.equal(frozen.post_llm.norm.weight, only.post_llm.norm.weight)
    real = NEO.from_pretrained(root / "reuse_real_llm" / "neo")
    assert real.text == "bypass" and torch.equal(real.post_llm.norm.weight, only.post_llm.norm.weight)
    assert not same_tensors(real.pre_buffer.state_dict(), asset.state_dict())
    changed = [blocks[0].self_attn.q_proj.weight for blocks in (real.post_llm.layers, only.post_llm.layers)]
    assert not torch.equal(*changed)  # by the adapters, which are merged
    stages = read_json(root / "reuse_stage2" / "neo" / "provenance.json")["stages"]
    assert [stage["stage"] for stage in stages] == ["bridges and H/W", "all, after the bridges"]


def test_an_asset_tells_its_recipes_but_not_where_things_lay(root: Path) -> None:
    good("export", root / "reuse_stage2", "-o", root / "again")
    text = (root / "again" / "config.json").read_text()
    assert str(root) not in text and str(root.parent) not in text
    one, two = (yaml.safe_load(stage["recipe"]) for stage in json.loads(text)["provenance"]["stages"])
    assert (one["stage"]["name"], one["stage"]["train"]) == ("bridges and H/W", ["bridge", "post_llm.hw"])
    assert two["data"]["tokenizer"] == "llm_b" and two["data"]["seq_len"] == 256
    told = (root / "again" / "README.md").read_text()
    assert "| all, after the bridges | 2 | all | train_all | 0 |" in told and "seq_len" not in told


# --- the benchmark


@pytest.fixture
def reuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/reuse.py as it finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    return importlib.import_module("reuse")


def test_every_arm_of_the_benchmark_is_a_recipe(reuse: Any) -> None:
    for arm, overrides in reuse.ARMS.items():
        assert validate_recipe("quickstart/attach", [*reuse.SCHEDULE, *overrides]) == [], arm


def test_the_table_counts_right(reuse: Any, tmp_path: Path) -> None:
    def arm(name: str, source: str, curve: list[tuple[int, float]], score: float, seed: int = 0) -> Any:
        scores = [(20, {"overall": score}), (curve[-1][0], {"overall": score + 0.1})]
        return reuse.Arm(name, "b", source, "scenes", seed, curve[-1][0], "X", curve, scores[: 2 - (len(curve) < 4)])

    # Means of three validations: 3, 3, 2.8, 2.0 | 3, 3, 2.7, 1.9 | 3, 2.5, 2.0 | 3, 2.85, 2.2 | 3, 2.95, 2.9
    goal = arm("random bypass", "scenes", [(0, 3.0), (10, 3.0), (20, 2.4), (40, 0.6)], 0.25)
    other = arm("random bypass", "scenes", [(0, 3.0), (10, 3.0), (20, 2.1), (40, 0.6)], 0.35, seed=1)
    there = arm("tuned bypass", "scenes", [(0, 3.0), (10, 2.0), (20, 1.0)], 0.75)
    again = arm("tuned bypass", "scenes", [(0, 3.0), (10, 2.7), (20, 0.9)], 0.85, seed=1)
    never = arm("frozen bypass", "easy_vqa", [(0, 3.0), (10, 2.9), (20, 2.8)], 0.5)
    same, transfer = reuse.report([goal, other, there, again, never], tmp_path).split("\n\nSource easy_vqa")
    assert "| steps for random's loss at 20, 30, 40 |" in same
    head = "| random bypass | 2.750 ± 0.071 | 0.300 ± 0.071 |  |"
    last = "| frozen bypass | 2.900 | 0.500 | over 1.00, over 1.00, over 0.50 |"
    assert transfer.splitlines()[4:6] == [head, last]
    reused = "| tuned bypass | 2.100 ± 0.141 | 0.800 ± 0.071 | 0.75, 0.75, over 0.50 |"
    assert same.splitlines()[4:] == [head, reused]
    assert (tmp_path / "reuse.png").stat().st_size > 10_000


def test_the_page_shows_what_was_measured(reuse: Any) -> None:
    top = Path(__file__).parent.parent
    reported = reuse.report(reuse.read(top / "benchmarks" / "results" / "arms.jsonl")).split("\n\n")
    page = (top / "docs" / "results" / "reuse.md").read_text(encoding="utf-8")
    tables = [part for part in reported if part.startswith("| arm")]
    assert len(tables) == 5 and [table for table in tables if table not in page] == []


def test_a_source_is_made(reuse: Any, root: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import reuse_setting

    monkeypatch.setattr(reuse_setting, "PIXELS", SIDE**2)
    for name in ("train_open", "train_all", "train_text", "validation"):
        (tmp_path / "easy_vqa" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "easy_vqa" / name).symlink_to(world / "shards")
    for name in "abc":
        (tmp_path / f"llm_{name}").symlink_to(world / "other")
    (tmp_path / "scenes").mkdir()  # is there, so it is not made
    reuse_setting.make(tmp_path, [("easy_vqa", 7)], {"easy_vqa": (16, 18, 32)})
    one, two, three = (PreBuffer.from_pretrained(reuse.asset(tmp_path, "easy_vqa", 7, stage)) for stage in (1, 2, 3))
    assert not same_tensors(one.state_dict(), two.state_dict())
    assert not same_tensors(two.state_dict(), three.state_dict())
    stages = read_json(reuse.asset(tmp_path, "easy_vqa", 7) / "config.json")["provenance"]["stages"]
    assert [(stage["steps"], yaml.safe_load(stage["recipe"])["seed"]) for stage in stages] == [
        (16, 7),
        (18, 7),
        (32, 7),
    ]


def test_an_arm_is_trained_and_measured(reuse: Any, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reuse_setting.PIXELS", SIDE**2)
    monkeypatch.setattr(reuse, "PIXELS", SIDE**2)
    monkeypatch.setattr(reuse, "SCHEDULE", [*reuse.SCHEDULE, "stage.warmup_steps=1"])
    for name, target in {"easy_vqa": root / "shards", "source_easy_vqa_0/pb3": root / "pre_buffer"}.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(target)
    arm = reuse.Arm("frozen bypass", "b", "easy_vqa", "easy_vqa", 0, 4)
    reuse.train_arm(arm, root, argparse.Namespace(every=2, steps=2, questions=4))
    assert [step for step, _ in arm.curve] == [0, 2, 4] and [step for step, _ in arm.scores] == [2, 4]
    assert arm.curve[2][1] < arm.curve[0][1] and set(arm.unexplained) == {"out"}
    assert set(arm.scores[0][1]) == {"overall", "color"}
