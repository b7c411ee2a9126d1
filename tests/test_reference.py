"""The textbook NEO and the library's give the same loss and the same gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from builders import random_sample, tiny_model
from reference_neo import ReferenceNEO, images_of
from torch.utils.flop_counter import FlopCounterMode

from neo_components import pack
from neo_components.training.groups import train_only

STAGE_1 = ["patch_embedding", "pre_buffer", "post_llm.hw"]


def test_loss_and_gradients_are_those_of_the_textbook() -> None:
    for groups in (STAGE_1, ["all"]):
        model = tiny_model()
        train_only(model, groups)
        samples = [random_sample(model.input_spec, seed, images=seed % 3, text=(3, 90)) for seed in range(5)]
        batch = pack(samples, model.input_spec, seq_len=sum(len(s.token_ids) for s in samples) + 5)
        reference = ReferenceNEO(model)
        ours, theirs = model.loss(batch), reference.loss(batch, images_of(samples))
        assert torch.allclose(ours, theirs, atol=1e-5)
        ours.backward()
        theirs.backward()
        stacks = [*model.pre_buffer.layers, *model.post_llm.layers]
        for block, plain in zip(stacks, reference.blocks, strict=True):
            for (name, a), (other, b) in zip(
                sorted(block.named_parameters()), sorted(plain.named_parameters()), strict=True
            ):
                assert name == other
                assert (a.grad is None) == (b.grad is None)
                if a.grad is not None:
                    assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4), name


def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks" / "step_flops.py"
    spec = importlib.util.spec_from_file_location("step_flops", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("groups", [STAGE_1, ["all"]])
def test_a_step_does_the_matrix_products_that_it_must(groups: list[str]) -> None:
    """Those that torch counts are those of the benchmark's formula: frozen weights cost no gradient, the head is read
    at labelled tokens only, and no product with a weight is done twice."""
    model = tiny_model()
    train_only(model, groups)
    samples = [random_sample(model.input_spec, seed, images=seed % 3, text=(3, 20)) for seed in range(5)]
    batch = pack(samples, model.input_spec)

    def in_place(into: Sequence[int], a: Sequence[int], b: Sequence[int], **others: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    # Torch does not count addmm_ by itself.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        model.loss(batch).backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_))
    assert products == benchmark().linear_flops(model, batch)
