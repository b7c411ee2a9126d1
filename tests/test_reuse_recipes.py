"""The recipes that attach an asset, each built and stepped on a small asset, language model and data."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from builders import same_tensors
from commands import SIDE, good

from neo_components import NEO, PreBuffer
from neo_components.recipe import list_recipes, validate_recipe
from neo_components.weights import read_json

SHORT = [
    "stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "stage.checkpoint_every=2", "data.workers=0",
    "data.row_length=256", f"data.min_pixels={SIDE**2}", f"data.max_pixels={SIDE**2}",
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
    for name in ("stage1", "stage2", "bridges"):
        good("train", f"reuse/{name}", f"variables.root={root}", *SHORT)
    return root


def test_these_are_all() -> None:
    assert {r.name for r in list_recipes() if r.name.startswith("reuse/")} == {
        "reuse/stage1", "reuse/stage2", "reuse/bridges"
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
    stages = read_json(root / "reuse_stage2" / "neo" / "provenance.json")["stages"]
    assert [stage["stage"] for stage in stages] == ["bridges and H/W", "all, after the bridges"]


def test_every_arm_of_the_benchmark_is_a_recipe_and_its_table_counts_right() -> None:
    spec = spec_from_file_location("reuse", Path(__file__).parent.parent / "benchmarks" / "reuse.py")
    assert spec is not None and spec.loader is not None
    reuse = sys.modules["reuse"] = module_from_spec(spec)
    spec.loader.exec_module(reuse)
    for arm, overrides in reuse.ARMS.items():
        assert validate_recipe("quickstart/attach", overrides) == [], arm
    random = reuse.Run("random", 0, [(10, 2.0), (20, 1.5), (40, 1.0)], 0.25)
    tuned = reuse.Run("tuned", 0, [(10, 1.0), (20, 0.9), (40, 0.5)], 0.75)
    never = reuse.Run("frozen", 0, [(10, 2.0), (40, 1.2)], 0.5)
    assert reuse.table([random, tuned, never], 40).splitlines()[2:] == [
        "| random | 1 | 1.000 | 0.250 | 40 | 1.00 |",
        "| tuned | 1 | 0.500 | 0.750 | 10 | 0.25 |",
        "| frozen | 1 | 1.200 | 0.500 | not reached |  |",
    ]
