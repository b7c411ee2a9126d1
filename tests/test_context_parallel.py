"""Context parallelism: several processes compute a batch together, and it is what one process computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model
from commands import good, neo
from context_child import crossing, trained
from test_bypass import around
from test_sharding import TESTS, torchrun
from torch import Tensor

from neo_components import NEO, PatchEmbedding
from neo_components.estimate.activations import kept_activations
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import Setting
from neo_components.recipe.stage import StageConfig
from neo_components.training.context_parallel.attention import kv_copies
from neo_components.training.context_parallel.model import check_model
from neo_components.training.context_parallel.slices import Slice
from neo_components.training.module import NEOTraining
from neo_components.types import IGNORED

GROUPED = {"num_heads": 8, "num_kv_heads": 4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}


def together(processes: int, folder: Path, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of several processes reports of a plan."""
    path = folder / f"plan{processes}.json"
    path.write_text(json.dumps(plan))
    done = torchrun(processes, TESTS / "context_child.py", path, folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.with_name(f"{path.stem}.rank{rank}.json").read_text()) for rank in range(processes)]


def check(result: dict[str, Any], targets: int, tolerance: float = 1e-5) -> None:
    """Loss, loss of each target, and every gradient are those of one process."""
    assert result["loss"] < 1e-6 and result["validation"] < 5e-6 and result["nll"] < 1e-5
    assert result["targets"] == targets
    assert result["gradient"] < tolerance and (result["largest"] > 0.1 or not targets)


def run(world: Path, output: Path, *overrides: str, **more: Any) -> dict[str, Any]:
    """A run of four steps in which everything trains and validation takes place."""
    options = [
        "stage.train=[all]", "stage.steps=4", "stage.validate_every=2", "stage.checkpoint_every=2", "stage.log_every=1",
        "stage.predictions=0", f"data.validation=[{{shards: {world}/shards}}]", f"output={output}", *overrides,
    ]  # fmt: skip
    return {"file": str(world / "run.yaml"), "overrides": options, **more}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two runs: losses, gradient norms, how far weights moved, validation, and what was counted."""
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-5)
    assert (one["tokens"], one["images"]) == (other["tokens"], other["images"])
    found, expected = (
        {name: value for name, value in result["metrics"].items() if not name.startswith(("perf/", "memory/"))}
        for result in (one, other)
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6) and "grad_norm/patch_embedding" in found


@pytest.mark.timeout(900)
def test_two_processes_compute_what_one_does(world: Path, tmp_path: Path) -> None:
    """Images over the border, documents on both sides, one key/value head for two processes; and runs of a recipe, one
    of which goes on in one process where the two stopped."""
    cases: dict[str, Any] = {
        "mixed": {"sizes": {}},
        "one key/value head": {"sizes": {"num_kv_heads": 1, "attention": "causal"}},
        "window": {"sizes": {"window": 9, "qk_norm": "whole", "norm_placement": "after"}},
        "lengths": {"sizes": {"rope_scaling": DYNAMIC}, "checkpointed": 1},
        "experts": {"sizes": {"num_experts": 4, "experts_per_token": 2}},
        "autocast": {"sizes": {}, "half": True},
        "words": {"sizes": {}, "batch": "words"},
        "unlabelled": {"sizes": {}, "batch": "unlabelled"},
    }
    both = ["stage.context_parallel=2", "trainer.devices=2"]
    plan = {
        name: run(world, tmp_path / name, *both, f"trainer.strategy={name}", "stage.ema=0.5")
        for name in ("ddp", "fsdp2")
    }
    first, second = together(2, tmp_path, {"size": 2, "cases": cases, "runs": plan})
    alone = trained(**run(world, tmp_path / "one", "stage.ema=0.5"))
    half = tmp_path / "ddp" / "checkpoints" / "step-000002.ckpt"
    resumed = trained(**run(world, tmp_path / "resumed", "stage.ema=0.5", resume=str(half)))
    targets = {"words": 48 + 69 + 1, "unlabelled": 0}
    batch = crossing(tiny_model().input_spec)
    for result in (first, second):
        for name in cases:
            # In half precision a gradient of a few tokens is rounded before it is added to those of the other slice.
            coarse = 0.005 if name == "autocast" else 1e-5
            check(result[name], targets.get(name, int((batch.labels != IGNORED).sum())), coarse)
        assert "must read the same batches" in result["different"]
        same(result["ddp"], alone)
        same(result["fsdp2"], alone)
    assert resumed["losses"] == pytest.approx(alone["losses"][2:], rel=1e-5)
    assert resumed["tokens"] == alone["tokens"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes_compute_what_one_does(world: Path, tmp_path: Path) -> None:
    """Four slices of one batch, and two groups of two, whose runs are those of two processes."""
    cases: dict[str, Any] = {
        "grouped": {"sizes": GROUPED},
        "two key/value heads": {"sizes": GROUPED | {"num_kv_heads": 2, "attention": "causal"}},
        "six key/value heads": {"sizes": {"num_heads": 12, "num_kv_heads": 6}},
        "words": {"sizes": {}, "batch": "words"},
    }
    strategies = ("ddp", "fsdp2")
    plans = {
        number: {
            name: run(world, tmp_path / f"{name}{number}", f"trainer.devices={number}", f"trainer.strategy={name}",
                      f"stage.context_parallel={number // 2}") for name in strategies
        } for number in (2, 4)
    }  # fmt: skip
    four = together(4, tmp_path, {"size": 4, "cases": cases, "runs": plans[4]})
    two = together(2, tmp_path, {"size": 2, "runs": plans[2]})
    batch = crossing(tiny_model().input_spec)
    for result in four:
        for name in cases:
            check(result[name], 118 if name == "words" else int((batch.labels != IGNORED).sum()))
        for name in strategies:
            same(result[name], two[0][name])


def test_a_slice_has_the_patches_of_its_tokens() -> None:
    """Slices joined are the batch; the border at 64 lies in an image, and one slice has no visual token of a row."""
    spec = tiny_model().input_spec
    batch = crossing(spec)
    slices = [Slice.of(batch, rank, 4) for rank in range(4)]
    parts = [one.batch(batch, spec.fold) for one in slices]
    assert torch.equal(torch.cat([part.token_ids for part in parts], dim=1), batch.token_ids)
    assert [len(part.patches) // spec.fold**2 for part in parts] == [int((part.image_ids >= 0).sum()) for part in parts]
    assert [int((part.image_ids[0] >= 0).sum()) for part in parts] == [2, 32, 14, 0]
    # Of the large image the first 2 visual tokens, in the first slice; of the second sequence all, behind them.
    assert torch.equal(parts[1].patches, batch.patches[2 * 4 : 34 * 4])
    assert torch.equal(parts[2].patches, batch.patches[34 * 4 : 48 * 4])
    predicted = sum(one.predicting(batch).count for one in slices)
    assert predicted == batch.indices.targets.count == int((batch.labels != IGNORED).sum())
    assert torch.equal(slices[1].following(batch.labels, IGNORED)[1], batch.labels[1, 33:65])


def test_key_value_heads_are_repeated_as_little_as_possible() -> None:
    assert [kv_copies(heads, 4) for heads in (8, 4, 2, 1, 6)] == [1, 1, 2, 4, 2]


class Whole(PatchEmbedding):
    """Each of its tokens depends on all patches."""

    def forward(self, patches: Tensor, patch_positions: Tensor, image_grids: Tensor | None = None) -> Tensor:
        return super().forward(patches - patches.mean(), patch_positions)


def test_what_cannot_be_computed_together_is_refused(world: Path) -> None:
    """With the sizes that work, before anything is loaded where the recipe shows it."""
    model = tiny_model(num_heads=6, num_kv_heads=3)
    check_model(model, 3)
    with pytest.raises(ValueError, match=r"4 processes cannot share the 6 query heads .*; choose one of 1, 2, 3, 6"):
        NEOTraining(model, StageConfig(train=("all",), context_parallel=4))
    with pytest.raises(ValueError, match=r"model.text=bypass .* use model.text=shared"):
        check_model(around(), 2)
    whole = NEO(Whole(32, width=16, patch_size=4), model.pre_buffer, model.post_llm)
    with pytest.raises(ValueError, match="a Whole may need whole images"):
        check_model(whole, 2)
    with pytest.raises(ValueError, match=r"sequences of 128 tokens .* multiple of 3, for example 129"):
        Slice.of(crossing(model.input_spec), 0, 3)
    for override, message in (
        ("trainer.devices=3", "multiple of 2, or stage.context_parallel to one of 1, 3"),
        ("data.seq_len=255", "for example 256"),
    ):
        for command in (["recipes", "validate"], ["train"]):
            done = neo(*command, world / "run.yaml", "trainer.devices=2", "stage.context_parallel=2", override)
            assert done.status == 1 and message in done.err, done.err
    none = neo("recipes", "validate", world / "run.yaml", "stage.context_parallel=0")
    assert "stage.context_parallel: got 0, must be 1 or more" in none.err
    with pytest.raises(ValueError, match=r"context_parallel must be 1 or more and divide devices \(3\), got 2"):
        Plan("ddp", 3, 2)


def test_each_process_keeps_its_part_of_the_activations(world: Path) -> None:
    """In estimates of memory, and in the report: a step of two groups has two micro-batches."""
    model = tiny_model(seed=1)
    batch, setting = crossing(model.input_spec), Setting("cpu")
    kept = kept_activations(model, batch, setting)
    alone, split = (step_memory(model, batch, setting, Plan("ddp", 4, c), kept).kinds for c in (1, 2))
    blocks = sum(block.full for block in (*kept.pre_buffer, *kept.post_llm))
    assert alone["activations"] - split["activations"] == pytest.approx(
        (blocks + kept.patch_embedding + kept.bridges + kept.head) / 2, abs=8
    )
    assert alone["weights"] == split["weights"] and alone["gradients"] == split["gradients"]
    told = good("inspect", world / "run.yaml", "trainer.devices=4", "stage.context_parallel=2")
    assert "group of 2 devices, 2 micro-batches a step" in " ".join(told.split())
