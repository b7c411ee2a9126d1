"""Low-rank adapters: the language model stays as it is, what is written is merged and equals what was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from builders import random_batch, tiny_model
from run_builders import MUON, pretraining, recipe_file, small_world, started
from test_faults import fit, rows

from neo_components import NEO, load_recipe
from neo_components.recipe import RecipeError
from neo_components.recipe.stage import LINEAR, LoRA, StageConfig
from neo_components.training.callbacks.drift import samples
from neo_components.training.lora import add_lora, lora_layers, lora_parameters, merge_lora
from neo_components.training.module import NEOTraining
from neo_components.training.optimizers import build_optimizer
from neo_components.training.run import train

BEFORE = ("patch_embedding", "pre_buffer", "post_llm.hw")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("run"))


def adapted(root: Path, name: str, train: str = "[patch_embedding, pre_buffer, post_llm.hw]", more: str = "") -> Path:
    return pretraining(root, name, train, f", lr: 1.0e-2, lora: {{rank: 4, alpha: 8}}{more}")


def targets(model: NEO) -> dict[str, torch.Tensor]:
    """Weights that the adapters change."""
    return {n: p for n, p in model.post_llm.layers.named_parameters() if n.split(".")[-2] in LINEAR}


@pytest.mark.parametrize("more", ["", MUON], ids=["adamw", "muon"])
def test_adapters_change_their_targets_and_all_else_of_the_language_model_stays(root: Path, more: str) -> None:
    path = adapted(root, "moved", more=more)
    before, result = started(path), train(load_recipe(path))
    after = dict(result.model.named_parameters())
    assert [name for name, _ in before.named_parameters()] == list(after)
    changed = {id(p) for p in targets(before).values()}
    changed |= {id(p) for name in BEFORE for p in before.groups()[name]}
    assert len(targets(before)) == 7 * 2
    for name, old in before.named_parameters():
        assert torch.equal(old, after[name]) is not (id(old) in changed), name
    stages = json.loads((result.folder / "provenance.json").read_text())["stages"]
    assert (stages[0]["lora"]["rank"], stages[0]["lora"]["targets"]) == (4, list(LINEAR))


def test_the_written_model_equals_the_one_that_was_trained(root: Path) -> None:
    """The weights of the last checkpoint, adapters beside their layers, against those of the folder."""
    recipe = load_recipe(adapted(root, "merged"))
    result = train(recipe)
    trained = NEOTraining(started(root / "merged.yaml"), recipe.stage)
    saved = torch.load(root / "merged" / "checkpoints" / "last.ckpt", weights_only=True)
    trained.load_state_dict(saved["state_dict"])
    assert len(lora_layers(trained)) == 7 * 2 and not lora_layers(result.model)
    written = NEO.from_pretrained(result.folder)
    batch, _ = random_batch(written.input_spec, 3)
    with torch.no_grad():
        plain, merged, unmerged = (
            m.eval()(batch).logits for m in (started(root / "merged.yaml"), written, trained.model)
        )
    assert torch.allclose(merged, unmerged, atol=1e-5)
    assert not torch.allclose(plain, merged, atol=1e-2)


def test_resume_equals_an_uninterrupted_run_and_the_next_stage_starts_merged(root: Path) -> None:
    recipe = load_recipe(adapted(root, "whole", more=", ema: 0.5"))
    whole = train(recipe)
    resumed = train(recipe, resume=root / "whole" / "checkpoints" / "step-000003.ckpt")
    assert [loss for step, _, loss in whole.losses if step > 3] == [loss for _, _, loss in resumed.losses]
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    path = recipe_file(root, "next", f"{{from_pretrained: {resumed.folder}}}", "train: [], lora: {rank: 2}")
    assert all(torch.equal(a, b) for a, b in zip(started(path).parameters(), resumed.model.parameters(), strict=True))
    after = train(load_recipe(path)).model
    old, new = targets(resumed.model), targets(after)
    assert not any(torch.equal(old[name], new[name]) for name in old)
    with pytest.raises(ValueError, match="is of another model"):
        train(load_recipe(path, ["stage.lora.rank=3"]), resume=root / "next" / "checkpoints" / "step-000003.ckpt")


def test_every_adapter_learns_and_starts_as_no_change() -> None:
    model, plain = tiny_model(), tiny_model()
    batch = rows(model.input_spec, 1)[0]
    module = NEOTraining(model, StageConfig(train=(), lora=LoRA(rank=2, alpha=4)))
    assert torch.equal(model.loss(batch), plain.loss(batch))
    assert set(map(id, module.trainable)) == set(map(id, lora_parameters(model)))
    assert list(module.groups) == ["post_llm", "post_llm.blocks", "post_llm.lora"]
    for _, _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B.default.weight, std=0.1)
    model.loss(batch).backward()
    layers = [f"{number}.{name}" for number, _ in enumerate(model.post_llm.layers) for name in LINEAR]
    assert len(lora_layers(model)) == len(layers)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_muon_leaves_the_factors_to_adamw() -> None:
    model = tiny_model()
    stage = StageConfig(train=("pre_buffer",), optimizer="muon", lora=LoRA(rank=2))
    module = NEOTraining(model, stage)
    factors = set(map(id, lora_parameters(model)))
    by_name = {g["name"]: set(map(id, g["params"])) for g in build_optimizer(model, stage).param_groups if g["params"]}
    assert factors <= set(map(id, module.trainable))
    assert not factors & by_name["muon"] and by_name["muon"]


def test_drift_counts_what_adapters_add() -> None:
    model, stage = tiny_model(), {"lora": LoRA(rank=2, alpha=4)}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    module = fit(model, rows(model.input_spec, 2), stage=stage | {"train": ()})
    watched = samples(module)
    merge_lora(model)
    moved = 0
    for name, parameter in model.named_parameters():
        adapted_name = name.removesuffix("weight") + "base_layer.weight"
        seen = watched.get(adapted_name, watched.get(name))
        assert seen is not None
        if parameter.numel() <= len(seen):
            assert torch.allclose(parameter.detach().flatten(), seen, atol=1e-7), name
            moved += adapted_name in watched and not torch.equal(parameter, before[name])
    assert moved == 7 * len(model.post_llm.layers)


# --- what is refused


def test_a_target_that_matches_nothing_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"targets: 'query', 'q_proj_hw' names no linear layer .* they have q_proj, k_"
    ):
        add_lora(tiny_model(), LoRA(targets=("q_proj", "query", "q_proj_hw")))


def test_peft_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'neo-components\[lora\]'"):
        add_lora(tiny_model(), LoRA())


def test_a_recipe_that_trains_what_lora_keeps_is_refused_with_all_other_faults(root: Path) -> None:
    path = pretraining(root, "faulty", "[pre_buffer, all]", ", lora: {rank: 0, alpha: -1, dropout: 1, targets: []}")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    told = str(error.value)
    for key in ("rank: got 0", "alpha: got -1", "dropout: got 1", "targets: is empty"):
        assert f"stage.lora.{key}" in told
    with pytest.raises(RecipeError, match=r"stage\.train: names all, but stage\.lora freezes the language model"):
        load_recipe(pretraining(root, "faulty", "[all]", ", lora: {}"))
    with pytest.raises(RecipeError, match=r"stage\.train: is empty"):
        load_recipe(pretraining(root, "faulty", "[]", ""))
