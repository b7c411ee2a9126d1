"""On a GPU: SDPA, compiled FlexAttention and plain attention agree, outputs and gradients; compiled blocks do too.

``--gpu-device cpu`` runs the same tests on a CPU, where FlexAttention is neither compiled nor has a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import random_sample, set_backend, tiny_model
from torch import Tensor
from torch._dynamo.utils import counters

from neo_components import NEO, Batch, pack
from neo_components.components.backends import prepare_attention
from neo_components.types import PADDING

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:flex_attention called without")]

LENGTHS = {"cuda": 1024, "cpu": 256}
"""Of a packed sequence; a GPU's kernels work on blocks of 128 tokens."""
HEADS, KV_HEADS = 4, 2

# Largest |a - b| / |b| (Euclidean norms) of outputs and of gradients. bfloat16 has 8 bits: 0.4 % for one rounding, of
# which the kernels make two or three; float32 must be exact but for the order of sums.
# On a CPU they are 5e-7 and 3e-3.
OF_KERNEL = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
# Of a model of four blocks, of its loss (absolute) and of the gradient of each weight. On a CPU in
# bfloat16 they are 1e-4 and 0.02.
OF_LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}
OF_WEIGHT = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of what is exact."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def packed(model: NEO, device: torch.device, count: int = 2, seed: int = 0) -> Batch:
    """Packed sequences with padding, of documents of a few to some hundred tokens, with 0 to 2 images each."""
    rows, length = [], LENGTHS[device.type]
    for row in range(count):
        samples, used = [], 0
        for number in range(200):
            longest = (8, 40, length // 6)[number % 3]
            sample = random_sample(model.input_spec, 1000 * seed + 200 * row + number, text=(2, longest))
            if used + len(sample.token_ids) > length - 5:
                break
            samples.append(sample)
            used += len(sample.token_ids)
        rows.append(pack(samples, model.input_spec, seq_len=length))
    return Batch.stack(rows).to(device)


def attended(
    backend: str, batch: Batch, inputs: list[Tensor], upstream: Tensor, rule: str, window: int | None
) -> list[Tensor]:
    """Output, and the gradients of q, k and v where there is a backward pass; padding set to 0."""
    gradients = backend != "flex" or upstream.is_cuda
    q, k, v = (x.detach().clone().requires_grad_(gradients) for x in inputs)
    attend = prepare_attention(batch.document_ids, batch.image_ids, rule, backend, window, batch.token_kinds)
    with torch.set_grad_enabled(gradients):
        out = attend(q, k, v, (q.shape[-1] // 2) ** -0.5)
    real = (batch.document_ids != PADDING)[..., None, None]
    found = [torch.where(real, out, 0)]
    if gradients:
        (out * torch.where(real, upstream, 0)).sum().backward()
        found += [torch.where(real, x.grad, 0) for x in (q, k, v)]
    return [x.detach() for x in found]


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize(
    ("width", "dtype", "rule", "window"),
    [
        pytest.param(128, torch.bfloat16, "mixed", None, id="e128-bfloat16"),  # heads of NEO-2.2B and 9B
        pytest.param(128, torch.float32, "mixed", None, id="e128-float32"),
        pytest.param(64, torch.bfloat16, "mixed", 100, id="e64-bfloat16-window"),
        pytest.param(32, torch.float32, "causal", None, id="e32-float32-causal"),
    ],
)
def test_attention_equals_plain_attention(
    backend: str, width: int, dtype: torch.dtype, rule: str, window: int | None, gpu_device: torch.device
) -> None:
    """Queries and keys 2E wide, values E wide, two heads for each pair of keys and values."""
    batch = packed(tiny_model(), gpu_device)
    shapes = [(HEADS, 2 * width), (KV_HEADS, 2 * width), (KV_HEADS, width), (HEADS, width)]
    *inputs, upstream = (torch.randn(*batch.token_ids.shape, *shape).to(gpu_device, dtype) for shape in shapes)
    exact = attended("eager", batch, [x.double() for x in inputs], upstream.double(), rule, window)
    found = attended(backend, batch, inputs, upstream, rule, window)
    assert len(found) == (1 if backend == "flex" and gpu_device.type == "cpu" else 4)
    errors = [error(a, b) for a, b in zip(found, exact, strict=False)]
    assert max(errors) < OF_KERNEL[dtype], f"of output, q, k, v: {errors}"


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_documents_do_not_leak(backend: str, gpu_device: torch.device) -> None:
    """Other queries, keys and values of one document leave the outputs of all others bit-equal."""
    batch = packed(tiny_model(), gpu_device)
    shapes = [(HEADS, 128), (KV_HEADS, 128), (KV_HEADS, 64)]
    inputs = [torch.randn(*batch.token_ids.shape, *shape).to(gpu_device, torch.bfloat16) for shape in shapes]
    one = batch.document_ids == 3
    changed = [torch.where(one[..., None, None], x + 1, x) for x in inputs]
    attend = prepare_attention(batch.document_ids, batch.image_ids, "mixed", backend, None, batch.token_kinds)
    with torch.no_grad():
        before, after = (attend(*x, scale=0.125) for x in (inputs, changed))
    others = ~one & (batch.document_ids != PADDING)
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[one], after[one])


def sized(device: torch.device) -> NEO:
    """Two and two blocks with heads as wide as those of NEO-2.2B."""
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_width": 128, "feed_forward_size": 384}
    model = tiny_model(**sizes)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # scores of a size that softmax does not saturate at
            if "norm" not in name:
                weight.mul_(0.1)
    return model.to(device)


def step(model: NEO, batch: Batch, dtype: torch.dtype, gradients: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients; bfloat16 by autocast, as a run's ``trainer.precision`` bf16-mixed does."""
    model.zero_grad()
    with (
        torch.autocast(batch.token_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16),
        torch.set_grad_enabled(gradients),
    ):
        loss = model.loss(batch)
    if gradients:
        loss.backward()
    grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return loss.detach(), grads


def check_step(found: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]], dtype: Any) -> None:
    """Loss and every weight's gradient; a gradient much smaller than the others counts with a hundredth of theirs."""
    assert abs(float(found[0] - exact[0])) < OF_LOSS[dtype]
    whole = torch.stack([grad.double().norm() for grad in exact[1].values()] or [exact[0].double()]).norm()
    for name, grad in found[1].items():
        norm = float(torch.maximum(exact[1][name].double().norm(), whole / 100))
        off = float((grad.double() - exact[1][name].double()).norm()) / norm
        assert off < OF_WEIGHT[dtype], f"{name}: {off}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_step_is_the_same_on_all_backends(dtype: torch.dtype, gpu_device: torch.device) -> None:
    """Loss and the gradient of every weight, beside those of plain attention in float32."""
    model = sized(gpu_device)
    batch = packed(model, gpu_device)
    set_backend(model, "eager")
    exact = step(model, batch, torch.float32)
    assert len(exact[1]) == len(list(model.parameters()))
    for backend in ("eager", "sdpa", "flex"):
        set_backend(model, backend)
        gradients = backend != "flex" or gpu_device.type == "cuda"
        check_step(step(model, batch, dtype, gradients), exact, dtype)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_compiled_blocks(gpu_device: torch.device, nothing_compiled: None) -> None:
    """The step that ``stage.compile`` makes: equal to the plain one, one graph for each kind of block, no graph break,
    and nothing compiled again for other documents and images."""
    cuda = gpu_device.type == "cuda"
    plain, other = sized(gpu_device), sized(gpu_device)
    for model in (plain, other):
        set_backend(model, "flex")
    for stack in (other.pre_buffer, other.post_llm):
        stack.compile_blocks("inductor" if cuda else "eager")
    graphs = []
    for seed in range(4):
        batch = packed(plain, gpu_device, count=1, seed=seed)
        exact = step(plain, batch, torch.bfloat16, gradients=cuda)
        check_step(step(other, batch, torch.bfloat16, gradients=cuda), exact, torch.bfloat16)
        graphs.append(counters["stats"]["unique_graphs"])
    assert sum(counters["graph_break"].values()) == 0, dict(counters["graph_break"])
    assert graphs == graphs[:1] * 4, "compiled again"
