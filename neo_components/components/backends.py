"""Attention backends: per-document SDPA, FlexAttention, FlashAttention, and an eager one that keeps attention weights.

A backend is prepared once per batch from the document and image ids and then called by every layer. All agree with
the mask rule of ``masks.py``; a padded token's output is unspecified (finite, never read).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neo_components.components.block_inputs import Attend
from neo_components.components.document_attention import SpanAttention
from neo_components.components.flex_attention import FlexAttention
from neo_components.components.masks import RuleName, dense_mask
from neo_components.components.varlen_attention import VarlenAttention
from neo_components.errors import one_of
from neo_components.token_indices import TokenIndices

BACKENDS = ("auto", "sdpa", "flex", "varlen", "eager")


def prepare_attention(
    document_ids: Tensor,
    image_ids: Tensor,
    rule: str | RuleName = "mixed",
    backend: str = "auto",
    window: int | None = None,
    token_kinds: Tensor | None = None,
    known: TokenIndices | None = None,
) -> Attend:
    """The backend for one batch.

    Args:
        document_ids: [B, L].
        image_ids: [B, L].
        rule: registered name of the mask rule.
        backend: ``sdpa``, ``flex``, ``varlen`` (FlashAttention, for causal masks on a GPU), ``eager``, or ``auto``:
            ``flex`` on CUDA, ``sdpa`` elsewhere (FlexAttention has no backward on CPU).
        window: how many tokens back a query attends (``masks.rule_of``); ``None``: all.
        token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
        known: what the CPU knows of the tokens; without it ``sdpa`` asks the device where the documents are.

    Raises:
        ValueError: if the backend's name is unknown, or ``varlen`` cannot compute this batch.
    """
    one_of("backend", backend, BACKENDS)
    if backend == "auto":
        backend = "flex" if document_ids.is_cuda else "sdpa"
    kinds: dict[str, Any] = {
        "sdpa": SpanAttention, "flex": FlexAttention, "varlen": VarlenAttention, "eager": EagerAttention,
    }  # fmt: skip
    return kinds[backend](document_ids, image_ids, rule, window, token_kinds, known)


class EagerAttention:
    """Plain matrix products over the packed sequence; ``weights`` collects [B, N, L, L] of each layer that called.

    Arguments as in :class:`SpanAttention`.
    """

    def __init__(
        self,
        document_ids: Tensor,
        image_ids: Tensor,
        rule: str | RuleName = "mixed",
        window: int | None = None,
        token_kinds: Tensor | None = None,
        known: TokenIndices | None = None,
    ) -> None:
        self.mask = dense_mask(document_ids, image_ids, rule, window, token_kinds=token_kinds)[:, None]
        self.weights: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
        scores = torch.einsum("bqnc,bknc->bnqk", q, k).float() * scale
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        self.weights.append(weights)
        return torch.einsum("bnqk,bkne->bqne", weights.to(v.dtype), v)
