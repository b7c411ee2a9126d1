"""Checkpointed blocks that keep their products: the same step, no product again, the memory that is estimated."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import pytest
import torch
from builders import random_batch, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neo_components import NEO, Batch
from neo_components.components.checkpointing import products_of
from neo_components.estimate.activations import kept_activations
from neo_components.estimate.flops import step_flops
from neo_components.estimate.tracing import Setting
from neo_components.recipe.stage import StageConfig
from neo_components.training.module import NEOTraining
from neo_components.types import PADDING


class Counts(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def model_that(keeps: str | None, **post: Any) -> NEO:
    """All of whose blocks keep everything (``None``), or are checkpointed."""
    model = tiny_model(post=post)
    for stack in (model.pre_buffer, model.post_llm):
        stack.checkpointed_blocks, stack.checkpoint_keeps = (0, "input") if keeps is None else (2, keeps)
    return model


def step(model: NEO, batch: Batch, bf16: bool) -> tuple[Tensor, list[Tensor | None], Counter[str]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(batch)
    with Counts() as counts:
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()], counts.seen


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("post", [{}, {"num_experts": 4, "experts_per_token": 2}], ids=["dense", "experts"])
def test_the_same_step_without_products_again(bf16: bool, post: dict[str, Any]) -> None:
    batch, _ = random_batch(tiny_model().input_spec, seed=3)
    loss, gradients, plain = step(model_that(None, **post), batch, bf16)
    for keeps in ("input", "products"):
        again, others, counts = step(model_that(keeps, **post), batch, bf16)
        assert torch.equal(loss, again)
        assert all(a is b or torch.equal(a, b) for a, b in zip(gradients, others, strict=True))  # type: ignore[arg-type]
        if keeps == "products":
            assert counts["aten.mm"] == plain["aten.mm"]
        else:
            # Seven products of the attention's and the feed-forward's inputs, and the one in between.
            assert counts["aten.mm"] >= plain["aten.mm"] + 4 * 6


def living() -> int:
    """Bytes of all tensors that Python holds, every storage once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def test_memory_is_that_of_the_estimate() -> None:
    batch, _ = random_batch(tiny_model().input_spec, seed=3)
    found, estimates = {}, {}
    for keeps in ("input", "products"):
        model = model_that(keeps)
        estimates[keeps] = kept_activations(model, batch, Setting()).total(2, 2)
        before = living()
        loss = model.loss(batch)
        found[keeps] = living() - before
        del loss
    tokens = batch.token_ids.numel()
    products = sum(products_of(block, tokens) for block in [*model.pre_buffer.blocks, *model.post_llm.blocks])
    # Queries and keys twice (T and H/W), values, output, gate, up and down, as wide as in ``builders.SIZES``.
    assert products == 4 * tokens * (32 + 32 + 16 + 16 + 16 + 32 + 48 + 48 + 32)
    assert estimates["products"] - estimates["input"] == 4 * products
    assert found["products"] - found["input"] == pytest.approx(4 * products, rel=0.02)


def test_only_attention_is_computed_again() -> None:
    batch, _ = random_batch(tiny_model().input_spec, seed=3)
    whole, part = (step_flops(model_that(keeps), batch)["post_llm"] for keeps in ("input", "products"))
    assert whole.again == whole.forward == part.forward
    model = model_that("products")
    real = int((batch.document_ids != PADDING).sum())
    linear = 2 * real * 2 * (32 * (32 + 32 + 16 + 16 + 16 + 32) + 3 * 32 * 48)
    assert part.again == part.forward - linear
    assert model.post_llm.checkpoint_keeps == "products"


def test_the_key_of_a_stage() -> None:
    stage = StageConfig(train=("all",), activation_checkpointing=0.5, checkpoint_keeps="products")
    model = NEOTraining(tiny_model(), stage).model
    assert {stack.checkpoint_keeps for stack in (model.pre_buffer, model.post_llm)} == {"products"}
    with pytest.raises(ValueError, match=r"stage\.checkpoint_keeps: products is for blocks that are not compiled"):
        StageConfig(train=("all",), activation_checkpointing=0.5, checkpoint_keeps="products", compile=True)
    with pytest.raises(ValueError, match=r"stage\.checkpoint_keeps: products has no effect at stage\.activation_check"):
        StageConfig(train=("all",), checkpoint_keeps="products")
