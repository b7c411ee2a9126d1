"""The fast paths on a GPU beside the plain form: FlexAttention's and FlashAttention's kernels, Liger, FP8."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from builders import random_batch, tiny_model
from torch import Tensor

from neo_components import NEO
from neo_components.components.backends import EagerAttention, prepare_attention
from neo_components.components.liger import use_liger
from neo_components.recipe.stage import StageConfig
from neo_components.training.fp8 import LEAST_CAPABILITY, use_fp8
from neo_components.training.groups import train_only
from neo_components.types import PADDING, Batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


def missing(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package.replace('_', '-')} is not installed"
    )


def batch_of(images: int) -> Batch:
    batch, _ = random_batch(tiny_model().input_spec, seed=5, rows=2, documents=6, text=(40, 90), images=images)
    return batch.to("cuda")


def furthest(ours: list[Tensor], plain: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    return max(
        float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in zip(ours, plain, strict=True)
    )


@pytest.mark.parametrize("backend", ["flex", "varlen"])
@pytest.mark.parametrize(("n", "k", "width"), [(16, 8, 128), (4, 2, 96), (6, 2, 64), (4, 2, 8)])
def test_attention_of_real_widths(backend: str, n: int, k: int, width: int) -> None:
    """Output and gradients of half-precision kernels, from the same numbers as the plain way in float32."""
    batch = batch_of(images=0 if backend == "varlen" else 2)
    where = (batch.document_ids, batch.image_ids)
    real = batch.document_ids != PADDING
    torch.manual_seed(0)
    shapes = [(*batch.token_ids.shape, heads, c) for heads, c in ((n, 2 * width), (k, 2 * width), (k, width))]
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    weight = torch.randn(int(real.sum()), n, width, device="cuda")
    found = []
    for attend, dtype in (
        (prepare_attention(*where, backend=backend, known=batch.indices), torch.bfloat16),
        (EagerAttention(*where), torch.float32),
    ):
        inputs = [x.to(dtype).requires_grad_() for x in given]
        out = attend(*inputs, width**-0.5)[real]
        (out.float() * weight).sum().backward()
        found.append([out.detach(), *(x.grad for x in inputs)])
    assert furthest(found[0], found[1]) < 0.03  # type: ignore[arg-type]


def step(model: NEO, batch: Batch) -> tuple[float, Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model.loss(batch)
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(change: str) -> tuple[float, float]:
    """Relative distance of the loss and cosine of the gradient after a change, against the model before it."""
    model = tiny_model(hidden_size=64, head_width=16, feed_forward_size=96).cuda()
    train_only(model, ["all"])
    batch, _ = random_batch(model.input_spec, seed=1)
    batch = batch.to("cuda")
    loss, gradient = step(model, batch)
    if change == "liger":
        assert use_liger(model) > 0
    else:
        assert use_fp8(model, StageConfig(train=("all",), fp8="linears")) == 28
    other, changed = step(model, batch)
    return abs(other / loss - 1), float(torch.nn.functional.cosine_similarity(gradient, changed, dim=0))


@missing("liger_kernel")
def test_liger() -> None:
    distance, cosine = compare("liger")
    assert distance < 0.005 and cosine > 0.999


@missing("torchao")
def test_fp8() -> None:
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        pytest.skip("this GPU has no FP8")
    distance, cosine = compare("fp8")
    assert distance < 0.02 and cosine > 0.85
