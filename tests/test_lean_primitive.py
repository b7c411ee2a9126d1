"""What is kept for the backward pass is less, and what comes out is the same as by the plain way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import random_batch, random_sample, randomize, tiny_model
from torch import Tensor, nn

from neo_components import NEO, Batch, pack
from neo_components.components import document_attention as spans
from neo_components.components import token_loss as losses
from neo_components.components.document_attention import SpanAttention
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.components.lean_primitive import lean_feed_forward, linears_after
from neo_components.components.masks import dense_mask
from neo_components.components.primitive import NativePrimitive
from neo_components.components.recompute import linears_of
from neo_components.training.groups import train_only


def kept_bytes(compute: Callable[[], Tensor], without: nn.Module) -> int:
    """Bytes that are kept for the backward pass, each storage once, the module's parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in without.parameters()}
    storages: dict[int, int] = {}
    held = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its address would be given to the next one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(storages.values())


def gradients(model: nn.Module, compute: Callable[[], Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad()
    compute().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [(), ("norm",), ("a.weight",), ("a", "b"), ("norm", "b.weight")])
def test_linear_layers_over_recomputed_inputs(bias: bool, frozen: tuple[str, ...]) -> None:
    """Values, and gradients of the input and of whatever learns, equal those of the modules one after the other."""
    torch.manual_seed(0)
    parts = nn.ModuleDict({"norm": RMSNorm(6), "a": nn.Linear(6, 4, bias), "b": nn.Linear(6, 3, bias)}).double()
    randomize(parts)
    for name, parameter in parts.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or ("none",)))
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for way in ("plain", "kept"):
        x.grad = None
        parts.zero_grad()
        if way == "plain":
            a, b = (parts[name](parts["norm"](x)) for name in ("a", "b"))
        else:
            a, b = linears_after(parts["norm"], x, (parts["a"], parts["b"]))
        (a.square().sum() + b.sin().sum()).backward()
        results.append([a.detach(), b.detach(), x.grad, *(p.grad for p in parts.parameters())])
    for plain, kept in zip(*results, strict=True):
        assert (plain is None) == (kept is None)
        assert plain is None or torch.allclose(plain, kept, atol=1e-6)


def test_a_layer_that_nothing_reads_gets_no_gradient() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    a, b = nn.Linear(4, 2), nn.Linear(4, 2)
    linears_of(torch.sin, (x,), (a, b))[1].sum().backward()
    assert a.weight.grad is None and b.weight.grad is not None
    assert torch.allclose(x.grad, x.detach().cos() * b.weight.detach().sum(0))


def test_adapters_and_hooks_are_called() -> None:
    """What stands in a linear layer's place, or listens to one, is not passed over."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(0)
    x, inner, heard = torch.randn(2, 4, requires_grad=True), Doubled(4, 3, bias=False), []
    assert torch.allclose(linears_of(torch.sin, (x,), (inner,))[0], 2 * x.sin() @ inner.weight.T)
    plain, norm = nn.Linear(4, 3), RMSNorm(4)
    plain.register_forward_hook(lambda module, args, out: heard.append("linear"))
    norm.register_forward_hook(lambda module, args, out: heard.append("norm"))
    linears_after(norm, x, (plain,))
    assert heard == ["norm", "linear"]


def test_gated_feed_forward_keeps_gate_and_up_alone() -> None:
    layer, x = GatedFeedForward(8, 24), torch.randn(1, 10, 8, requires_grad=True)
    norm = RMSNorm(8)
    outer = nn.ModuleList([layer, norm])

    def lean() -> Tensor:
        return lean_feed_forward(layer, norm, x, None)

    assert torch.equal(lean(), layer(norm(x)))
    assert kept_bytes(lean, outer) == 4 * (80 + 2 * 240)
    for parameter in outer.parameters():
        parameter.requires_grad_(False)
    assert kept_bytes(lean, outer) == 4 * (80 + 2 * 240)
    x.requires_grad_(False)
    assert kept_bytes(lean, outer) == 0


@pytest.mark.parametrize("unit", [1, 40, 1 << 17])
@pytest.mark.parametrize(("rule", "window"), [("mixed", None), ("causal", None), ("mixed", 4), ("causal", 300)])
def test_units_of_any_size_attend_alike(monkeypatch: pytest.MonkeyPatch, unit: int, rule: str, window: Any) -> None:
    """Single queries, some queries, several documents: output and gradients of torch's SDPA over a dense mask."""
    monkeypatch.setattr(spans, "UNIT", unit)
    batch, _ = random_batch(tiny_model().input_spec, seed=3, rows=2, documents=5, text=(3, 14))
    torch.manual_seed(0)
    rows, length = batch.token_ids.shape
    make = [torch.randn(rows, length, heads, width, dtype=torch.float64) for heads, width in ((6, 8), (3, 8), (3, 4))]
    real = batch.document_ids >= 0
    grad = torch.randn(rows, length, 6, 4, dtype=torch.float64) * real[..., None, None]
    found = []
    for dense in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in make)
        attend = SpanAttention(batch.document_ids, batch.image_ids, rule, window)
        if dense:
            see = dense_mask(batch.document_ids, batch.image_ids, rule, window)[:, None]
            heads = [x.transpose(1, 2) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*heads, see, scale=0.3, enable_gqa=True).transpose(1, 2)
        else:
            out = attend(q, k, v, 0.3)
        out.backward(grad)
        found.append([out[real].detach(), q.grad, k.grad, v.grad])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_loss_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of torch's cross-entropy, whatever the chunks, with and without a divisor."""
    monkeypatch.setattr(losses, "LOGITS", 0)
    torch.manual_seed(0)
    for chunk, divisor in ((3, 1.0), (3, 2.5), (100, 2.5)):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        state = torch.randn(11, 6, requires_grad=True)
        head = torch.randn(17, 6, requires_grad=True)
        target, weight = torch.randint(0, 17, (11,)), torch.rand(11)
        results = []
        for way in (False, True):
            state.grad = head.grad = None
            if way:
                loss, each = losses.token_loss(state, head, target, weight, divisor)
                assert not each.requires_grad
            else:
                each = F.cross_entropy(state @ head.T / divisor, target, reduction="none")
                loss = (each * weight).sum()
            (3 * loss).backward()
            results.append([loss.detach(), each.detach(), state.grad, head.grad])
        for plain, ours in zip(*results, strict=True):
            assert torch.allclose(plain, ours, atol=1e-5)


def by_plain_ways(model: NEO, batch: Batch) -> Tensor:
    """The loss with the whole matrix of weights and all logits, every tensor kept that torch keeps."""
    for stack in (model.pre_buffer, model.post_llm):
        stack.backend = "eager"
        for block in stack.layers:
            block.__class__ = NativePrimitive  # the same weights, computed as the paper writes it
    out = model(batch).logits[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(out.float(), batch.labels[:, 1:].flatten(), reduction="none")
    weight = batch.loss_weights[:, 1:].flatten()
    return (nll * weight).sum() / weight.sum()


@pytest.mark.parametrize("groups", [["patch_embedding", "pre_buffer", "post_llm.hw"], ["all"]])
def test_a_step_is_that_of_the_plain_ways(groups: list[str]) -> None:
    """Loss and gradients, and less than half is kept."""
    model, other = tiny_model(), tiny_model()
    for one in (model, other):
        train_only(one, groups)
    batch, _ = random_batch(model.input_spec, seed=7, rows=2, documents=4, text=(5, 30))
    ours = gradients(model, lambda: model.loss(batch))
    theirs = gradients(other, lambda: by_plain_ways(other, batch))
    for name, gradient in ours.items():
        assert (gradient is None) == (theirs[name] is None), name
        assert gradient is None or torch.allclose(gradient, theirs[name], atol=1e-5, rtol=1e-4), name
    assert kept_bytes(lambda: model.loss(batch), model) < 0.5 * kept_bytes(lambda: by_plain_ways(other, batch), other)


def test_nothing_is_kept_below_the_first_part_that_learns() -> None:
    """A frozen patch embedding and pre-Buffer keep nothing; what the post-LLM keeps does not grow with their depth."""
    kept = []
    for depth in (1, 4):
        model = tiny_model(pre={"depth": depth})
        train_only(model, ["post_llm"])
        model.post_llm.word_embedding.requires_grad_(False)
        batch, _ = random_batch(model.input_spec, seed=7, images=1)
        kept.append(kept_bytes(lambda: model.loss(batch), model))  # noqa: B023
    assert kept[0] == kept[1] > 0


@pytest.mark.parametrize("way", ["autocast", "true"])
def test_bfloat16_keeps_norms_and_rotary_in_float32(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Norms and angles are computed in float32 whatever the weights' type, and a step stays close to float32's."""
    exact, rounded = tiny_model(), tiny_model()
    samples = [random_sample(exact.input_spec, seed, images=seed % 3) for seed in range(6)]
    batch = pack(samples, exact.input_spec)
    expected = gradients(exact, lambda: exact.loss(batch))
    if way == "true":
        rounded = rounded.bfloat16()
    seen: set[tuple[str, torch.dtype]] = set()
    mean, cosine = Tensor.mean, Tensor.cos

    def spy_mean(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(("norm", x.dtype))
        return mean(x, *args, **kwargs)

    def spy_cosine(x: Tensor) -> Tensor:
        seen.add(("angle", x.dtype))
        return cosine(x)

    monkeypatch.setattr(Tensor, "mean", spy_mean)
    monkeypatch.setattr(Tensor, "cos", spy_cosine)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loss = rounded.loss(batch)
    loss.backward()
    assert seen == {("norm", torch.float32), ("angle", torch.float32)}
    tables = rounded.post_llm.rotary(batch.positions)
    assert {table.dtype for table in tables} == {torch.float32}
    assert torch.equal(tables[0], exact.post_llm.rotary(batch.positions)[0])
    assert float(loss.detach()) == pytest.approx(float(exact.loss(batch).detach()), rel=0.02)
    whole = torch.cat([gradient.flatten() for gradient in expected.values() if gradient is not None])
    mine = torch.cat([p.grad.float().flatten() for p in rounded.parameters() if p.grad is not None])
    assert float(F.cosine_similarity(whole, mine, dim=0)) > 0.99
