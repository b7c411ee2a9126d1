"""``neo inspect``: numbers of a recipe without its weights, offline, with a warning where it will not fit."""

from __future__ import annotations

import json
import re
import resource
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import good, neo

from neo_components import NEO, attach, build, load_recipe
from neo_components.components.pre_buffer import AssetInfo
from neo_components.estimate.activations import kept_activations
from neo_components.estimate.assumed import Document, assumed_batch
from neo_components.estimate.flops import step_flops
from neo_components.estimate.tracing import Setting
from neo_components.inspection import Assumed, inspect_recipe
from neo_components.inspection.shape import empty_model
from neo_components.model.attach import export_pre_buffer
from neo_components.training.activation_checkpointing import worst_batches
from neo_components.training.groups import train_only


def report(*arguments: str | Path) -> dict[str, Any]:
    return json.loads(good("inspect", *arguments, "--json"))  # type: ignore[no-any-return]


def test_the_large_model_costs_no_memory() -> None:
    """9 billion parameters, told in a process that stays far below their 38 GB."""
    found = report("neo_9b/pretrain", "--device-memory", "80")
    assert found["groups"]["patch_embedding"]["parameters"] == pytest.approx(17.6e6, rel=0.01)
    groups = found["groups"]
    trained = groups["patch_embedding"]["parameters"] + groups["pre_buffer"]["parameters"]
    assert found["total"]["trained"] == trained + groups["post_llm.hw"]["parameters"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 6e9
    assert found["tokens"] == 128 * 8192
    # Six FLOPs per parameter and token, four for frozen ones with a backward pass, as a check of the order of size.
    linear = groups["pre_buffer"]["parameters"]
    assert 6 * linear < sum(found["flops_per_token"]["pre_buffer"][k] for k in ("forward", "backward")) < 8 * linear
    frozen = found["flops_per_token"]["post_llm"]
    assert 1.0 < frozen["backward"] / frozen["forward"] < 1.4
    assert found["warnings"] == [] and found["peak"] < 80e9
    assert found["peak"] <= sum(found["memory"].values())


def test_figures_are_those_of_the_built_model(world: Path) -> None:
    """The shape alone gives the FLOPs and parameters that the real model has."""
    recipe = load_recipe(world / "run.yaml")
    found = inspect_recipe(recipe, Assumed(visual=16, text=10, device_memory=8))
    model = build(recipe.model)
    train_only(model, recipe.stage.train)
    batch = assumed_batch(model, Document(16, 10), recipe.data["micro_batch_size"], recipe.data["seq_len"])
    assert found.flops == step_flops(model, batch)
    assert found.total == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    assert found.assumptions["document"] == "28 tokens: 16 visual (given), 10 text, half of them target tokens"
    assert found.tokens == 256
    twice = inspect_recipe(load_recipe(world / "run.yaml", ["trainer.accumulate_grad_batches=2", "trainer.devices=3"]),
                           Assumed(visual=16, text=10))  # fmt: skip
    assert twice.tokens == 6 * 256 and "gradient buckets" in twice.memory
    assert twice.flops["post_llm"].forward == 6 * found.flops["post_llm"].forward


def test_it_warns_when_it_will_not_fit(world: Path) -> None:
    out = good("inspect", world / "run.yaml", "--device-memory", "0.0001")
    assert "WARNING: will not fit: " in out and "on a device of 0.0 GB" in out and "fsdp2" in out
    peak = report(world / "run.yaml", "--device-memory", "1")["peak"] / 1e9
    assert "WARNING: will be tight" in good("inspect", world / "run.yaml", "--device-memory", f"{1.05 * peak:.9f}")
    assert "WARNING" not in good("inspect", world / "run.yaml", "--device-memory", f"{2 * peak:.9f}")
    never = good("inspect", world / "run.yaml", "stage.activation_checkpointing=auto", "--device-memory", "0.0001")
    assert "WARNING: stage.activation_checkpointing auto: with every block checkpointed" in never
    assert never.count("WARNING") == 1


def test_what_a_run_refuses_is_told(world: Path) -> None:
    for line, reason in (("trainer.strategy=fsdp", "shards the weights in a way"),
                         ("trainer.strategy=fsdp2 stage.optimizer=muon", "muon orthogonalizes full")):  # fmt: skip
        assert f"WARNING: neo train refuses this: {line.split()[-1].split('=')[0]}" in good(
            "inspect", world / "run.yaml", *line.split()
        )
        done = neo("recipes", "validate", str(world / "run.yaml"), *line.split())
        assert done.status == 1 and reason in done.err


def test_other_devices_make_another_step() -> None:
    line = next(
        line for line in good("inspect", "neo_2b/pretrain", "--devices", "8").splitlines() if "recipe's own" in line
    )
    assert "a step has 65,536 tokens here and 1,048,576 on the recipe's own 128 devices" in line
    assert "16 times trainer.accumulate_grad_batches" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's memory is found")
def test_without_a_gpu_the_shipped_recipes_are_told_all_the_same() -> None:
    found = report("neo_2b/pretrain")
    assert found["device_memory"] is None and found["warnings"] == [] and found["peak"] > 0
    assert (
        found["notes"][-1].startswith("stage.activation_checkpointing auto: estimated without")
        and "--device-memory" in found["notes"][-1]
    )
    assert found["assumptions"]["activation checkpointing"] == "0 + 0 blocks"


def test_strategies_divide(world: Path) -> None:
    def memory(*arguments: str) -> dict[str, int]:
        found: dict[str, int] = report(world / "run.yaml", "--device-memory", "1", *arguments)["memory"]
        return found

    one, ddp = memory(), memory("--strategy", "ddp", "--devices", "4")
    divided = memory("--strategy", "fsdp2", "--devices", "4")
    halves = memory("--strategy", "fsdp2", "--devices", "2")
    assert ddp["weights"] == one["weights"] == pytest.approx(4 * divided["weights"], abs=4)
    assert ddp["gradient buckets"] == ddp["gradients"]
    assert halves["weights"] == pytest.approx(2 * divided["weights"], abs=4)


def test_the_commands_of_the_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "inspect.md").read_text()
    lines = re.findall(r"^neo (inspect .*?)(?:\s+#.*)?$", page, re.MULTILINE)
    assert len(lines) == 4
    outputs = [good(*shlex.split(line)) for line in lines]
    assert "all steps take" in outputs[0] and "WARNING" not in outputs[0]
    assert "gradient buckets" in outputs[1]
    assert json.loads(outputs[2])["assumptions"]["activation checkpointing"] == "3 + 18 blocks"
    assert outputs[3].startswith("# complete recipe")
    assert "322 tokens: 256 visual (given), 64 text" in outputs[3]


@pytest.mark.parametrize("bridge", ["auto", "random"])
def test_assets_and_checkpoints_have_the_shape_of_what_is_built(world: Path, tmp_path: Path, bridge: str) -> None:
    """An asset on a language model of another width, and the checkpoint that comes of it."""
    export_pre_buffer(NEO.from_pretrained(world / "neo"), tmp_path / "asset", world / "neo", 64, AssetInfo())
    parts = [f"pre_buffer: {{from_pretrained: {tmp_path / 'asset'}}}"]
    parts += [f"post_llm: {{from_pretrained: {world / 'other'}}}", f"bridge: {bridge}"]
    (tmp_path / "a.yaml").write_text(f"model: {{{', '.join(parts)}}}")
    made, _ = empty_model(load_recipe(tmp_path / "a.yaml"))
    real = attach(tmp_path / "asset", world / "other", "random")
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    real.save_pretrained(tmp_path / "neo")
    (tmp_path / "b.yaml").write_text(f"model: {{from_pretrained: {tmp_path / 'neo'}, dtype: bfloat16}}")
    again, notes = empty_model(load_recipe(tmp_path / "b.yaml"))
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in again.parameters()) and notes == []
    out = good("inspect", tmp_path / "b.yaml")
    assert "note: no stage and data: parameters only" in out and "GFLOPs" not in out


def test_what_building_refuses_is_refused_alike(world: Path, tmp_path: Path) -> None:
    """Another base than the language model's, another rope than the asset's: the same words as from a run."""
    export_pre_buffer(NEO.from_pretrained(world / "neo"), tmp_path / "asset", world / "neo", 64, AssetInfo())
    asset, llm = f"{{from_pretrained: {tmp_path / 'asset'}}}", f"{{from_pretrained: {world / 'other'}}}"
    (tmp_path / "asset.yaml").write_text(f"model: {{pre_buffer: {asset}, post_llm: {llm}, bridge: random}}")
    for path, override, told in (
        (world / "run.yaml", "model.rope.base_t=5", "model.rope.base_t is 5.0, but the language model"),
        (tmp_path / "asset.yaml", "model.rope.kind=1d", "model.rope is '1d', but the pre-Buffer"),
    ):
        recipe = load_recipe(path, [override])
        with pytest.raises(ValueError, match=told) as built:
            build(recipe.model)
        done = neo("inspect", path, override)
        assert done.status == 1 and str(built.value) in done.err
    done = neo("inspect", "neo_2b/pretrain", "model.rope.base_t=5")
    assert done.status == 1 and "was trained with 1000000.0" in done.err


def test_targets_of_adapters_are_looked_at_without_weights(world: Path, tmp_path: Path) -> None:
    wrong = "stage.lora.targets=[q_proj,query]"
    own = (world / "run.yaml").read_text()
    (tmp_path / "no_data.yaml").write_text(own[: own.index("data:")])
    for words in (["recipes", "validate", world / "run.yaml"], ["inspect", world / "run.yaml"],
                  ["inspect", tmp_path / "no_data.yaml"]):  # fmt: skip
        done = neo(*words, wrong)
        assert done.status == 1 and "stage.lora.targets: 'query' names no linear layer of the" in done.err
    right = neo("recipes", "validate", world / "run.yaml", "stage.lora.targets=[q_proj]")
    assert (right.status, right.out, right.err) == (0, "valid\n", "")
    unknown = neo("recipes", "validate", world / "run.yaml", wrong, "model.post_llm.from_pretrained=no/such-model")
    assert (unknown.status, unknown.out) == (0, "valid\n")
    assert "stage.lora.targets are not checked: 'no/such-model' is no folder here" in unknown.err


def test_what_is_not_known_is_told(world: Path, tmp_path: Path) -> None:
    done = neo("inspect", world / "run.yaml", "model.post_llm.from_pretrained=no/such-model")
    assert done.status == 1 and "'no/such-model' is no folder here" in done.err and "Traceback" not in done.err
    (tmp_path / "x.yaml").write_text("model: {from_pretrained: not/there/neo}\nstage: {train: [all]}\n")
    done = neo("inspect", tmp_path / "x.yaml")
    assert done.status == 1
    assert "'not/there/neo' is no folder" in done.err and "no recipe beside" in done.err
    done = neo("inspect", world / "run.yaml", "trainer.precision=transformer-engine")
    assert done.status == 1 and "trainer.precision 'transformer-engine' is unknown; known: 32-true" in done.err
    done = neo("inspect", world / "run.yaml", "--image-tokens", "4000")
    assert done.status == 1 and "does not fit a packed sequence of 256" in done.err


def test_recompute_auto_in_a_run_and_in_inspect_agree(world: Path, tmp_path: Path, caplog: Any) -> None:
    """The share that a run takes is the one that was told, and the trained weights are those of a run without it."""
    caplog.set_level("INFO")
    plain = tmp_path / "plain"
    good("train", world / "run.yaml", f"output={plain}", "model.pre_buffer.depth=2")
    recipe = load_recipe(world / "run.yaml", ["model.pre_buffer.depth=2"])
    model, _ = empty_model(recipe)
    train_only(model, recipe.stage.train)
    kept = [kept_activations(model, batch, Setting()) for batch in worst_batches(model, recipe.data, "cpu")]
    none, every = (max(k.total(*c) + k.largest(*c) for k in kept) for c in ((0, 0), (2, 2)))
    assert every < none
    auto = [
        "model.pre_buffer.depth=2",
        "stage.activation_checkpointing=auto",
        f"stage.activation_gb={(none + every) / 2e9:.9f}",
    ]
    told = report(world / "run.yaml", *auto)["assumptions"]["activation checkpointing"]
    assert told != "0 + 0 blocks"
    good("train", world / "run.yaml", f"output={tmp_path / 'auto'}", *auto)
    [line] = [r.getMessage() for r in caplog.records if "stage.activation_checkpointing auto" in r.getMessage()]
    pre, post = (int(word) for word in told.split() if word.isdigit())
    assert f"{pre} of 2 + {post} of 2 blocks" in line
    one, other = (NEO.from_pretrained(folder / "neo").state_dict() for folder in (plain, tmp_path / "auto"))
    assert all(torch.equal(one[name], other[name]) for name in one)
