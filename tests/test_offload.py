"""Optimizer states in the CPU's memory change no number."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from builders import random_batch, tiny_model
from torch import Tensor

from neo_components.estimate.activations import kept_activations
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import Setting
from neo_components.recipe.stage import StageConfig
from neo_components.training.fsdp2.strategy import refuse_unshardable
from neo_components.training.lora import set_trainable
from neo_components.training.optimizers import Joined, OffloadedAdamW, build_optimizer


def stage_of(optimizer: str, offload: str) -> StageConfig:
    return StageConfig(train=("all",), optimizer=optimizer, offload=offload, lr=1e-2)  # type: ignore[arg-type]


def steps(optimizer: str, offload: str, skipped: Sequence[bool]) -> tuple[list[Tensor], dict[str, object]]:
    """Weights and state after steps with the same gradients; the optimizer is saved and loaded on the way."""
    model = tiny_model()
    set_trainable(model, stage_of(optimizer, offload))
    made = build_optimizer(model, stage_of(optimizer, offload))
    for number, skips in enumerate(skipped):
        generator = torch.Generator().manual_seed(number)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
            weight.grad[..., 0] = float("nan") if skips else 1.0
        made.found_inf = torch.tensor(float(skips))  # type: ignore[attr-defined]
        made.step()
        if number == 1:
            state = copy.deepcopy(made.state_dict())
            made = build_optimizer(model, stage_of(optimizer, offload))
            made.load_state_dict(state)
    return [weight.detach() for weight in model.parameters()], made.state_dict()["state"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_offloaded_steps_are_the_same(optimizer: str) -> None:
    """Bit for bit, with skipped steps among them; the state is saved and loaded on the way."""
    pattern = [False, False, True, False]
    weights, state = steps(optimizer, "none", pattern)
    offloaded, its_state = steps(optimizer, "optimizer", pattern)
    assert all(torch.equal(a, b) for a, b in zip(weights, offloaded, strict=True))
    assert state.keys() == its_state.keys()
    for number, own in state.items():
        assert all(torch.equal(own[name], its_state[number][name]) for name in own)  # type: ignore[index]


def test_what_is_built() -> None:
    model = tiny_model()
    set_trainable(model, stage_of("muon", "optimizer"))
    assert isinstance(build_optimizer(model, stage_of("adamw", "optimizer")), OffloadedAdamW)
    joined = build_optimizer(model, stage_of("muon", "optimizer"))
    assert isinstance(joined, Joined) and all(part.offloads for part in joined.parts)  # type: ignore[attr-defined]


def test_the_estimate_counts_the_largest_weight_alone() -> None:
    model, setting = tiny_model(), Setting()
    batch, _ = random_batch(model.input_spec, 1)
    kept = kept_activations(model, batch, setting)
    memory = [step_memory(model, batch, setting, Plan(), kept, offloads=offloads) for offloads in (False, True)]
    largest = max(weight.numel() for weight in model.parameters())
    assert memory[1].kinds["optimizer states"] == 8 * largest
    assert memory[0].peak - memory[1].peak == 8 * (sum(w.numel() for w in model.parameters()) - largest)


def test_sharded_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stage.offload: optimizer is for full weights; trainer.strategy=fsdp2"):
        refuse_unshardable(stage_of("adamw", "optimizer"))
