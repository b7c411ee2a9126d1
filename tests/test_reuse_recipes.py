"""The recipes that attach an asset, each built and stepped on a small asset, language model and data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from builders import same_tensors
from commands import SIDE, good

from neo_components import NEO, PreBuffer
from neo_components.recipe import list_recipes
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
