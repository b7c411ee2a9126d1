"""Compiled blocks: the same loss and gradients, names of weights stay, nothing compiles after the first batch."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from builders import random_sample, set_backend, tiny_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask

from neo_components import NEO, Batch, pack
from neo_components.components.masks import block_mask
from neo_components.components.token_loss import token_loss
from neo_components.recipe.stage import StageConfig
from neo_components.training.groups import train_only
from neo_components.training.module import NEOTraining

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")
ROW = 256


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batches(model: NEO, count: int) -> Iterator[Batch]:
    """Rows of one length, of documents and images of other sizes in each."""
    for seed in range(count):
        samples = [random_sample(model.input_spec, 10 * seed + n, text=(1, 8 + seed)) for n in range(3 + seed % 3)]
        yield pack(samples, model.input_spec, seq_len=ROW)


def staged(groups: list[str]) -> NEO:
    model = tiny_model(post={"depth": 3}, pre={"depth": 2})
    train_only(model, groups)
    return model


def compiled(model: NEO, backend: str) -> NEO:
    for stack in (model.pre_buffer, model.post_llm):
        stack.compile_blocks(backend)
    return model


def check_against_plain(groups: list[str], backend: str, count: int) -> list[int]:
    """Steps of a compiled and a plain model are equal; returns how many graphs there were after each batch."""
    plain, other = staged(groups), compiled(staged(groups), backend)
    assert plain.state_dict().keys() == other.state_dict().keys()
    graphs = []
    for batch in batches(plain, count):
        losses = []
        for model in (plain, other):
            model.zero_grad()
            losses.append(model.loss(batch))
            losses[-1].backward()
        graphs.append(counters["stats"]["unique_graphs"])
        assert torch.allclose(*losses, atol=1e-5)
        for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4), name
    return graphs


def test_nothing_is_compiled_after_the_first_batch() -> None:
    """Ten batches of other documents and images; alike blocks share one graph, so five blocks need few."""
    graphs = check_against_plain(["patch_embedding", "pre_buffer", "post_llm.hw"], "aot_eager", 10)
    assert 0 < graphs[0] <= 8
    assert graphs == graphs[:1] * 10


def test_whole_blocks_with_flex_attention() -> None:
    """The path of a GPU, here without gradients: one graph for each kind of block, no break, none later."""
    plain, other = staged(["all"]), compiled(staged(["all"]), "eager")
    graphs = []
    for model in (plain, other):
        set_backend(model, "flex")
    for batch in batches(plain, 10):
        with torch.no_grad():
            assert torch.allclose(plain.loss(batch), other.loss(batch), atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 10 or graphs == [2] * 10
    assert sum(counters["graph_break"].values()) == 0


def test_a_block_mask_is_built_once_per_batch_and_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not per layer, nor by each stack anew."""
    from neo_components.components import flex_attention

    made: list[Any] = []

    def counted(*where: Any, **kinds: Any) -> BlockMask:
        made.append(block_mask(*where, **kinds))
        return made[-1]

    monkeypatch.setattr(flex_attention, "block_mask", counted)
    model = tiny_model(post={"depth": 3, "window": 5, "window_layers": [1]}, pre={"depth": 2})
    set_backend(model, "flex")
    with torch.no_grad():
        for number, batch in enumerate(batches(model, 3), 1):
            model.loss(batch)
            assert len(made) == 2 * number


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler on CPU"
)


@needs_compiler
def test_compiled_block_masks() -> None:
    """Equal to the plain ones, and compiled once for rows of one length."""
    model = tiny_model()
    graphs = []
    for batch in batches(model, 4):
        where = (batch.document_ids, batch.image_ids)
        assert torch.equal(block_mask(*where, compiled=True).to_dense(), block_mask(*where).to_dense())
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1] * 4


@needs_compiler
@pytest.mark.slow
def test_inductor_compiles_once() -> None:
    graphs = check_against_plain(["all"], "inductor", 10)
    assert graphs == graphs[:1] * 10


def test_a_stage_compiles_the_blocks() -> None:
    module = NEOTraining(tiny_model(), StageConfig(train=("all",), compile=True))
    layers = [*module.model.pre_buffer.layers, *module.model.post_llm.layers]
    assert all(layer._compiled_call_impl is not None for layer in layers)
    module = NEOTraining(tiny_model(), StageConfig(train=("all",)))
    assert all(layer._compiled_call_impl is None for layer in module.model.post_llm.layers)


def check_compiled(call: Callable[..., Tensor], arguments: Sequence[list[Any]], trained: list[nn.Parameter]) -> None:
    """One graph without a break for ten different batches, forward and backward; values and gradients are equal."""
    graphs = torch.compile(call, fullgraph=True, dynamic=False, backend="aot_eager")
    for number, given in enumerate(arguments):
        found = []
        for one in (call, graphs):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                out = one(*given)
            found.append([out, *torch.autograd.grad(out.square().sum(), trained)])
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    assert len(arguments) == 10 and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def hidden_of(batch: Batch, width: int) -> Tensor:
    return torch.randn(*batch.token_ids.shape, width, generator=torch.Generator().manual_seed(1))


def test_a_block_alone() -> None:
    plain = tiny_model()
    block = plain.pre_buffer.blocks[0]
    inputs = []
    for batch in batches(plain, 10):
        where = (batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds)
        inputs.append([hidden_of(batch, 32), block.prepare(*where, backend="eager")])
    check_compiled(block, inputs, list(block.parameters()))


def test_a_pre_buffer_alone() -> None:
    """Whole: rotary tables and masks are made in the graph."""
    plain = tiny_model()
    set_backend(plain, "eager")
    inputs = [
        [hidden_of(batch, 32), batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds]
        for batch in batches(plain, 10)
    ]
    check_compiled(plain.pre_buffer, inputs, list(plain.pre_buffer.layers.parameters()))


def test_the_loss_alone() -> None:
    """Its custom gradient is captured as a part of the graph."""
    head = nn.Parameter(torch.randn(60, 32, generator=torch.Generator().manual_seed(2)))
    given = []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        state, target = torch.randn(512, 32, generator=generator), torch.randint(60, (512,), generator=generator)
        given.append([state, target, torch.rand(512, generator=generator)])

    def loss(state: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return token_loss(state, head, target, weight)[0]

    check_compiled(loss, given, [head])
