"""The recipes of NEO-2.2B and NEO-9B: the numbers of the spec, and each one really builds, trains and hands on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from commands import SIDE, good, neo

from neo_components import NEO, load_recipe
from neo_components.inspection.shape import empty_model
from neo_components.recipe import Checkpoint, Compose, list_recipes
from neo_components.storage.weights import read_json
from neo_components.training.module import lr_factor

STAGES = ("pretrain", "midtrain", "sft")
FOLDERS = ("neo_2b", "neo_2b_released", "neo_9b", "neo_9b_released")
NAMES = [f"{folder}/{stage}" for folder in FOLDERS for stage in STAGES]


class Numbers(NamedTuple):
    """A stage in the paper's table of hyper-parameters, or in the released scripts."""

    steps: int
    lr: float
    floor: float
    warmup: int
    side: int
    """of the largest image, pixels"""
    row: int
    rows: int
    """of a step on all devices"""
    batch: int
    """samples of a step"""
    longest: int | None


PAPER = {
    "pretrain": Numbers(190_000, 8e-4, 0.05, 2000, 1024, 8192, 128, 2560, 8192),
    "midtrain": Numbers(50_000, 4e-5, 0.1, 200, 2048, 8192, 128, 1200, 8192),
    "sft": Numbers(6_000, 5e-5, 0.0, 200, 2048, 8192, 128, 650, 8192),
}
RELEASED_2B = {
    "pretrain": Numbers(200_000, 8e-4, 0.1, 1000, 2048, 16384, 40, 2560, 8192),
    "midtrain": Numbers(50_000, 5e-5, 0.2, 1500, 4096, 32768, 16, 1024, None),
    "sft": Numbers(4_500, 6e-5, 0.1, 135, 4096, 34816, 8, 512, None),
}
RELEASED_9B = {
    "pretrain": RELEASED_2B["pretrain"],
    "midtrain": Numbers(50_000, 5e-5, 0.2, 200, 4096, 18432, 16, 1024, None),
    "sft": Numbers(4_500, 6e-5, 0.0, 200, 4096, 18432, 8, 512, None),
}
TABLE = {"neo_2b": PAPER, "neo_9b": PAPER, "neo_2b_released": RELEASED_2B, "neo_9b_released": RELEASED_9B}


def test_these_are_all() -> None:
    assert sorted(r.name for r in list_recipes() if r.name.startswith("neo_")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_the_spec(name: str) -> None:
    folder, stage_name = name.split("/")
    want, recipe = TABLE[folder][stage_name], load_recipe(name)
    stage, data, trainer = recipe.stage, recipe.data, recipe.trainer
    assert (stage.steps, stage.lr, stage.min_lr_ratio, stage.warmup_steps) == want[:4]
    assert (data["seq_len"], data["max_length"]) == (want.row, want.longest)
    assert (data["min_pixels"], data["max_pixels"]) == (256**2, want.side**2)
    rows = (
        data["micro_batch_size"] * trainer["devices"] * trainer.get("num_nodes", 1) * trainer["accumulate_grad_batches"]
    )
    assert rows == want.rows
    released = folder.endswith("_released")
    assert stage.betas == ((0.9, 0.95) if released else (0.9, 0.999))
    assert (stage.optimizer, stage.eps, stage.weight_decay) == ("adamw", 1e-8, 0.01)
    assert (trainer["gradient_clip_val"], trainer["precision"]) == (1.0, "bf16-mixed")
    first = stage_name == "pretrain"
    assert stage.train == (("patch_embedding", "pre_buffer", "post_llm.hw") if first else ("all",))
    shares = [source.weight for source in data["train"]]
    assert shares == ([1.0] if stage_name == "sft" else [0.7, 0.3])
    assert lr_factor(stage.steps, stage) == pytest.approx(want.floor)
    assert lr_factor(stage.warmup_steps, stage) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_the_header_says_what_a_reader_asks(name: str) -> None:
    folder, stage = name.split("/")
    path = load_recipe(name).path
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("what:", "reproduces:", "hardware:", "hours", "expected score:", f"neo train {name}"):
        assert word in text, word
    want = TABLE[folder][stage]
    assert f"{want.batch} samples" in text and f"{want.rows} rows of {want.row} tokens" in text
    assert f"{round(want.rows * want.row / want.batch)} tokens long" in text


@pytest.mark.parametrize(
    ("folder", "depths", "hidden", "non_embedding"),
    [("neo_2b", (12, 28), 2048, 2.27e9), ("neo_9b", (6, 36), 4096, 9.00e9)],
)
def test_shapes_are_those_of_the_spec(folder: str, depths: tuple[int, int], hidden: int, non_embedding: float) -> None:
    """Spec 1.4, without a download; later stages have the shape of what the first one makes."""
    for name in (folder, f"{folder}_released"):
        for stage in ("pretrain", "sft") if name == folder else ("midtrain",):
            recipe = load_recipe(f"{name}/{stage}")
            model, notes = empty_model(recipe)
            assert isinstance(recipe.model, Compose if stage == "pretrain" else Checkpoint)
            assert (len(model.pre_buffer.layers), len(model.post_llm.layers)) == depths
            assert model.post_llm.hparams.hidden_size == hidden and model.post_llm.hparams.base_t == 1e6
            embeddings = {id(p): p for p in (model.post_llm.word_embedding.weight, model.post_llm.head_weight)}
            count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in embeddings.values())
            assert count == pytest.approx(non_embedding, rel=0.01)
            position = "rotary" if name.endswith("released") else "sincos"
            assert model.patch_embedding.hparams.position == position
            assert all(p.is_meta for p in model.parameters())
            assert any("table of known models" in note for note in notes)


SHORT = [
    "stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "stage.checkpoint_every=2", "data.workers=0",
    "data.seq_len=256", "data.max_length=128", f"data.min_pixels={SIDE**2}", f"data.max_pixels={SIDE**2}",
    "trainer.accelerator=cpu", "trainer.devices=1", "trainer.num_nodes=1", "trainer.strategy=auto",
]  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_builds_trains_and_hands_on(folder: str, world: Path, tmp_path: Path) -> None:
    """At reduced width: the language model is a small one, the depth that of its blocks."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("pretrain_images", "pretrain_text", "midtrain_images", "midtrain_text", "sft", "validation"):
        (data / name).symlink_to(world / "shards")
    shared = [f"variables.shards={data}", f"variables.root={tmp_path}", f"variables.llm={world / 'llm'}", *SHORT]
    for stage in STAGES:
        own = ["model.pre_buffer.depth=1", "model.patch_embedding={width: 16, patch_size: 4}"]
        good("train", f"{folder}/{stage}", *shared, *(own if stage == "pretrain" else []))
    model = NEO.from_pretrained(tmp_path / "sft" / "neo")
    assert model.patch_embedding.hparams.position == ("rotary" if folder.endswith("released") else "sincos")
    made = read_json(tmp_path / "sft" / "neo" / "provenance.json")["stages"]
    assert [stage["stage"] for stage in made] == ["pre-training", "mid-training", "sft"]
    assert [stage["steps"] for stage in made] == [2, 2, 2]


def test_data_that_is_not_there_is_named(world: Path, tmp_path: Path) -> None:
    changes: list[Any] = [f"variables.llm={world / 'llm'}", f"variables.root={tmp_path}", *SHORT]
    own = ["model.pre_buffer.depth=1", "model.patch_embedding={width: 16, patch_size: 4}"]
    done = neo("train", "neo_2b/pretrain", f"variables.shards={tmp_path / 'none'}", *changes, *own)
    assert done.status == 1
    assert "none/pretrain_images" in done.err and "Traceback" not in done.err
    done = neo("train", "neo_2b/midtrain", f"variables.shards={world}", *changes)
    assert done.status == 1
    assert f"{tmp_path}/pretrain/neo" in done.err and "no folder" in done.err
