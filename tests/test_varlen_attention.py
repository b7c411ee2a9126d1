"""FlashAttention over documents: the form in which its kernel is called, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from builders import random_batch, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from neo_components.components.backends import EagerAttention, prepare_attention
from neo_components.components.varlen_attention import VarlenAttention
from neo_components.registry import MASKS
from neo_components.types import PADDING, Batch


def by_document(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int) -> Tensor:
    """What FlashAttention computes, as its documentation says it, with the widths that it demands."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and starts.dtype == torch.int32
    parts = []
    for start, end in pairwise(starts.tolist()):
        assert end - start <= longest
        queries, keys, values = (
            x[start:end].float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (q, k, v)
        )
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = (distance < 0) | ((distance > window) if window >= 0 else False)
        scores = torch.einsum("qnc,knc->nqk", queries, keys) * scale
        parts.append(torch.einsum("nqk,knc->qnc", scores.masked_fill(hidden, float("-inf")).softmax(-1), values))
    return torch.cat(parts).to(v.dtype)


def batch_of(images: int, seed: int = 5) -> Batch:
    batch, _ = random_batch(tiny_model().input_spec, seed=seed, rows=2, documents=4, images=images)
    assert (batch.document_ids == PADDING).any()
    return batch


def heads(batch: Batch, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = batch.token_ids.shape
    return [
        torch.randn(*shape, n, c, generator=generator).bfloat16()
        for n, c in ((4, 2 * width), (2, 2 * width), (2, width))
    ]


@pytest.mark.parametrize(("rule", "window", "images"), [("mixed", None, 0), ("causal", None, 2), ("mixed", 5, 0)])
@pytest.mark.parametrize("known", [False, True])
def test_equals_the_plain_way(rule: str, window: int | None, images: int, known: bool) -> None:
    batch = batch_of(images)
    where = (batch.document_ids, batch.image_ids, rule, window)
    attend = VarlenAttention(*where, known=batch.indices if known else None, kernel=by_document)
    out, expected = (one(*heads(batch), 0.3) for one in (attend, EagerAttention(*where)))
    real = batch.document_ids != PADDING
    assert out.shape == (*batch.token_ids.shape, 4, 8) and out.dtype == torch.bfloat16
    assert torch.allclose(out[real].float(), expected[real].float(), atol=0.02)
    assert out.isfinite().all()


def test_calls_the_kernel_of_torch() -> None:
    """On fake tensors of a GPU: its arguments are those of this version of torch, and shapes come out right."""
    with FakeTensorMode():
        ids = torch.zeros(2, 64, dtype=torch.int64, device="cuda")
        attend = VarlenAttention.__new__(VarlenAttention)
        from neo_components.components.varlen_attention import flash_kernel

        attend.kernel, attend.longest, attend.window = flash_kernel(ids.device), 64, -1
        attend.starts = torch.zeros(3, dtype=torch.int32, device="cuda")
        q, k, v = (
            torch.zeros(2, 64, n, c, dtype=torch.bfloat16, device="cuda") for n, c in ((16, 256), (8, 256), (8, 128))
        )
        out = attend(q, k, v, 0.1)
    assert out.shape == (2, 64, 16, 128) and out.device.type == "cuda"


def test_what_it_refuses() -> None:
    batch, words = batch_of(2), batch_of(0)
    with pytest.raises(
        ValueError, match="plain causal order only, and the mask rule 'mixed' is not causal inside the im"
    ):
        VarlenAttention(batch.document_ids, batch.image_ids, kernel=by_document)
    with pytest.raises(ValueError, match="a window of 5 does not cut through the images of this batch; use 'flex'"):
        VarlenAttention(batch.document_ids, batch.image_ids, "causal", 5, kernel=by_document)
    MASKS.register("own-of-varlen")(lambda query, key: query.position >= key.position)
    try:
        with pytest.raises(ValueError, match="nothing is known of the mask rule 'own-of-varlen'"):
            VarlenAttention(words.document_ids, words.image_ids, "own-of-varlen", kernel=by_document)
    finally:
        MASKS.remove("own-of-varlen")
    attend = VarlenAttention(words.document_ids, words.image_ids, kernel=by_document)
    with pytest.raises(ValueError, match=r"computes in bfloat16 or float16, got torch.float32; set trainer.precision"):
        attend(*(x.float() for x in heads(words)), 1.0)
    with pytest.raises(ValueError, match="takes queries up to 256 wide, got 384"):
        attend(*heads(words, 192), 1.0)
    with pytest.raises(ValueError, match="needs a GPU, got cpu; use 'auto'"):
        prepare_attention(words.document_ids, words.image_ids, backend="varlen")
