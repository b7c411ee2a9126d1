"""Attention backends: per-document SDPA, FlexAttention, an eager one that keeps attention weights, and the KV cache.

A backend is prepared once per batch from the document and image ids and then called by every layer. All agree with
the mask rule of ``masks.py``; a padded token's output is unspecified (finite, never read).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_components.components.block_inputs import Attend
from neo_components.components.document_attention import Bucket, SpanAttention, make_buckets, sdpa
from neo_components.components.masks import LayerRule, RuleName, Tokens, block_mask, dense_mask, rule_of
from neo_components.errors import one_of
from neo_components.token_indices import TokenIndices
from neo_components.types import NO_IMAGE, TokenKind

BACKENDS = ("auto", "sdpa", "flex", "eager")


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
        backend: ``sdpa``, ``flex``, ``eager``, or ``auto``: ``flex`` on CUDA, ``sdpa`` elsewhere (FlexAttention has
            no backward on CPU).
        window: how many tokens back a query attends (``masks.rule_of``); ``None``: all.
        token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
        known: what the CPU knows of the tokens; without it ``sdpa`` asks the device where the documents are.

    Raises:
        ArgumentError: (a ``ValueError``) if the backend's name is unknown.
    """
    one_of("backend", backend, BACKENDS)
    if backend == "auto":
        backend = "flex" if document_ids.is_cuda else "sdpa"
    kinds: dict[str, Any] = {"sdpa": SpanAttention, "flex": FlexAttention, "eager": EagerAttention}
    return kinds[backend](document_ids, image_ids, rule, window, token_kinds, known)


def flex_attention() -> Any:
    """Torch's FlexAttention, which is slow to import."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    return flex


@lru_cache(maxsize=1)
def compiled_flex_attention() -> Any:
    """FlexAttention compiled, for blocks that are not compiled."""
    return torch.compile(flex_attention(), dynamic=False)


class FlexAttention:
    """FlexAttention with a BlockMask over the packed sequence; compiled on CUDA, eager (forward only) on CPU.

    Arguments as in :class:`SpanAttention`. A call raises ValueError if a gradient is required on CPU.
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
        self.mask = block_mask(document_ids, image_ids, rule, window, token_kinds=token_kinds)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError("FlexAttention has no backward on CPU; use attention backend 'sdpa' for training there")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        flex = flex_attention() if torch.compiler.is_compiling() or not q.is_cuda else compiled_flex_attention()
        out = flex(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)


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


class KVCache:
    """Keys and values of S documents for generation: prefill once, then one token per document and step.

    Keys are twice as wide as values, as they hold T, H and W channels.

    Args:
        document_ids: [1, L] one packed sequence of S prompts, without padding.
        image_ids: [1, L].
        rules: mask rule and window of each layer. What is cached has attended already, so a token after the prompt
            attends as its rule states and changes no token before it.
        room: new tokens per document to make room for.
        token_kinds: [1, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
    """

    def __init__(
        self,
        document_ids: Tensor,
        image_ids: Tensor,
        rules: Sequence[LayerRule],
        room: int,
        token_kinds: Tensor | None = None,
    ) -> None:
        causal = LayerRule("causal")
        buckets = {
            rule: make_buckets(document_ids, image_ids, *rule, one=True, token_kinds=token_kinds)[0]
            for rule in {*rules, causal}
        }
        self.lengths = buckets[causal].lengths
        self.room = room
        self.tokens = _with_room(buckets[causal], room)
        self._masks: dict[LayerRule, Tensor] = {}
        self.layers = [_CachedLayer(self, buckets[rule], rule) for rule in rules]

    def advance(self) -> None:
        """Counts the token that every document just got."""
        self.lengths = self.lengths + 1
        self._masks = {}

    def keep(self, documents: Tensor) -> None:
        """Drops all documents but those of index [s] int64."""
        self.lengths, self._masks = self.lengths[documents], {}
        self.tokens = self.tokens.map(lambda x: x[documents])
        for layer in self.layers:
            if layer.filled:
                layer.k, layer.v = layer.k[documents], layer.v[documents]

    def mask(self, rule: LayerRule) -> Tensor:
        """[S, 1, 1, used] bool: the keys that the newest token of each document attends to."""
        if rule not in self._masks:
            used = int(self.lengths.max()) + 1
            newest = self.tokens.map(lambda x: x.gather(1, self.lengths[:, None])[..., None])
            attended = rule_of(*rule)(newest, self.tokens.map(lambda x: x[:, None, :used]))
            written = torch.arange(used, device=attended.device) <= self.lengths[:, None]
            self._masks[rule] = (attended & written[:, None])[:, None]
        return self._masks[rule]


def _with_room(bucket: Bucket, room: int) -> Tokens:
    """[S, m + room]: the tokens of prompts, and words behind each."""
    prompt = bucket.tokens
    length = prompt.position.shape[1] + room
    index = torch.arange(length, device=prompt.position.device).expand(len(bucket.lengths), -1)
    new = index >= bucket.lengths[:, None]
    image, kind = (F.pad(x, (0, room)) for x in (prompt.image, prompt.kind))
    return Tokens(
        torch.zeros_like(index), image.masked_fill(new, NO_IMAGE), kind.masked_fill(new, TokenKind.TEXT), index
    )


class _CachedLayer:
    """One layer's part of the cache; an :class:`Attend`."""

    k: Tensor
    v: Tensor

    def __init__(self, cache: KVCache, bucket: Bucket, rule: LayerRule) -> None:
        self.cache, self.bucket, self.rule = cache, bucket, rule
        self.filled = False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return self._decode(q, k, v, scale) if self.filled else self._prefill(q, k, v, scale)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        bucket, valid = self.bucket, self.bucket.valid
        q_grid, k_grid, v_grid = (bucket.gather(x.flatten(0, 1)) for x in (q, k, v))
        out = sdpa(q_grid, k_grid, v_grid, bucket.mask, scale)
        self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, self.cache.room)) for x in (k_grid, v_grid))
        self.filled = True
        return torch.zeros_like(out[valid]).index_copy(0, bucket.index[valid], out[valid])[None]

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        lengths = self.cache.lengths
        rows = torch.arange(len(lengths), device=lengths.device)
        self.k[rows, lengths], self.v[rows, lengths] = k[:, 0], v[:, 0]
        attended = self.cache.mask(self.rule)
        used = attended.shape[-1]
        return sdpa(q, self.k[:, :used], self.v[:, :used], attended, scale)
