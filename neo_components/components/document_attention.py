"""Attention inside each document: its cost is the sum of the squared document lengths, not the square of L.

A bucket holds documents of similar length, and it is computed in units that fit a processor's cache. The backward pass
needs only queries, keys and values (or the tensors that queries and keys were computed from): it recomputes the
attention weights of a unit, as FlashAttention does (Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from neo_components.components.masks import RuleName, Tokens, rule_of, span_tokens
from neo_components.components.recompute import Compute, again, spread
from neo_components.token_indices import Span, TokenIndices, document_spans, sent
from neo_components.types import NO_IMAGE, TokenKind, kinds_of

UNIT = 1 << 17
"""Pairs of query and key that are computed together, over one head."""

HALF = (torch.bfloat16, torch.float16)
FUSED = 256
"""Length of documents from which half precision uses SDPA's fused kernel on CPU, which keeps no scores."""


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, to be computed together.

    Args:
        index: [n, m] index of each token in the flattened [B * L] batch; filling points at the document's start.
        lengths: [n] tokens of each document.
        images: [n, m] image of each token.
        kinds: [n, m] kind of each token.
        rule: mask rule.
        window: how many tokens back a query attends; ``None``: all.
    """

    index: Tensor
    lengths: Tensor
    images: Tensor
    kinds: Tensor
    rule: str | RuleName
    window: int | None

    @cached_property
    def tokens(self) -> Tokens:
        """[n, m] each."""
        return span_tokens(self.images, self.lengths, self.kinds)

    @property
    def valid(self) -> Tensor:
        """[n, m] bool: not filling."""
        return torch.arange(self.index.shape[1], device=self.index.device) < self.lengths[:, None]

    @cached_property
    def causal(self) -> bool:
        """Whether plain causal order gives the same mask: filling comes after its document, so it hides that too."""
        words = bool((self.tokens.kind == TokenKind.TEXT).all())
        return words and reads_text_causally(self.rule, self.window, self.index.shape[1])

    @cached_property
    def real(self) -> tuple[Tensor, Tensor]:
        """[r] each: indices of the real tokens in the flattened batch, and in the flattened bucket."""
        real = self.valid.flatten().nonzero()[:, 0]
        return self.index.flatten()[real], real

    def to(self, device: torch.device) -> Bucket:
        """The same on a device, which is never asked for what is known here."""
        if self.index.device == device:
            return self
        columns: dict[str, Any] = {
            name: sent(getattr(self, name), device) for name in ("index", "lengths", "images", "kinds")
        }
        moved = replace(self, **columns)
        moved.__dict__["causal"] = self.causal
        moved.__dict__["real"] = tuple(sent(x, device) for x in self.real)
        return moved

    @cached_property
    def mask(self) -> Tensor | None:
        """[n, 1, m, m] bool, or ``None`` where plain causal order gives the same mask."""
        if self.causal:
            return None
        attends = rule_of(self.rule, self.window)
        return attends(self.tokens.map(lambda x: x[..., :, None]), self.tokens.map(lambda x: x[..., None, :]))[:, None]

    def gather(self, x: Tensor) -> Tensor:
        """[B * L, ...] -> [n, m, ...]."""
        return x.index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def units(self) -> Iterator[Unit]:
        """The bucket's pairs of query and key, cut so that each unit has about ``UNIT`` of them."""
        count, length = self.index.shape
        together = max(1, UNIT // length**2)
        step = length if together > 1 else max(16, UNIT // length)
        for document in range(0, count, together):
            for start in range(0, length, step):
                yield self._unit(slice(document, document + together), slice(start, start + step))

    def _unit(self, documents: slice, queries: slice) -> Unit:
        index, valid = self.index[documents], self.valid[documents]
        tokens = self.tokens.map(lambda x: x[documents])
        query = tokens.map(lambda x: x[:, queries, None])
        attends = rule_of(self.rule, self.window)(query, tokens.map(lambda x: x[:, None]))
        used = attends.flatten(0, 1).any(0).nonzero()[:, 0]
        keys = slice(int(used[0]), int(used[-1]) + 1)
        hidden = ~attends[:, :, keys]
        return Unit(Part.of(index[:, queries], valid[:, queries]), Part.of(index[:, keys], valid[:, keys]),
                    hidden if bool(hidden.any()) else None)  # fmt: skip


@lru_cache(maxsize=256)
def reads_text_causally(rule: str | RuleName, window: int | None, length: int) -> bool:
    """Whether the rule is plain causal order in a document of ``length`` words."""
    none = torch.full((1, length), NO_IMAGE, device="cpu")
    words = span_tokens(none, torch.tensor([length], device="cpu"))
    attends = rule_of(rule, window)(words.map(lambda x: x[..., :, None]), words.map(lambda x: x[..., None, :]))
    return bool((attends == torch.ones(length, length, dtype=torch.bool, device="cpu").tril()).all())


@dataclass(frozen=True)
class Part:
    """Tokens of some documents, [d, m] of them.

    Args:
        shape: d and m.
        index: [d * m] index of each in the flattened batch.
        filling: [d, m] bool, or ``None`` if all are real.
        real: [r] indices of the real ones, into ``index`` and into the batch; ``None`` and ``index`` if all are real.
    """

    shape: tuple[int, int]
    index: Tensor
    filling: Tensor | None
    real: tuple[Tensor | None, Tensor]

    @classmethod
    def of(cls, index: Tensor, valid: Tensor) -> Part:
        """From [d, m] indices and whether they are real."""
        flat = index.flatten()
        if bool(valid.all()):
            return cls((index.shape[0], index.shape[1]), flat, None, (None, flat))
        real = valid.flatten().nonzero()[:, 0]
        return cls((index.shape[0], index.shape[1]), flat, ~valid, (real, flat[real]))

    def take(self, x: Tensor, groups: int) -> Tensor:
        """[B * L, heads, C] -> [d * K, G * m, C] float32, heads being K groups of G; filling holds real numbers."""
        taken = x.index_select(0, self.index).view(*self.shape, groups, -1, x.shape[-1])
        taken = taken.permute(0, 2, 3, 1, 4).reshape(self.shape[0] * groups, -1, x.shape[-1])
        return taken.float() if x.dtype in HALF else taken

    def put(self, x: Tensor, out: Tensor, groups: int, add: bool = False) -> None:
        """The reverse of :meth:`take` into ``out`` [B * L, heads, C]; filling is dropped."""
        x = x.view(self.shape[0], groups, -1, self.shape[1], x.shape[-1]).permute(0, 3, 1, 2, 4)
        x = x.reshape(-1, *out.shape[1:])
        source, target = self.real
        x = (x if source is None else x.index_select(0, source)).to(out.dtype)
        if add:
            out.index_add_(0, target, x)
        else:
            out.index_copy_(0, target, x)


@dataclass(frozen=True)
class Unit:
    """Some queries, all keys that any of them attends to, and [d, queries, keys] bool of the pairs that the mask hides
    (``None``: none)."""

    queries: Part
    keys: Part
    hidden: Tensor | None

    def weights(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[d * K, G * queries, C] and [d * K, keys, C] -> [d * K, G * queries, keys], the attention weights."""
        scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
        if self.hidden is not None:
            documents, queries, keys = self.hidden.shape
            scores.view(documents, -1, queries, keys).masked_fill_(self.hidden[:, None], float("-inf"))
        return scores.softmax(-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        """Writes what the queries read into ``out``; all [B * L, heads, C]."""
        groups = k.shape[1]
        weights = self.weights(self.queries.take(q, groups), self.keys.take(k, groups), scale)
        self.queries.put(torch.bmm(weights, self.keys.take(v, groups)), out, groups)

    def backward(self, grad: Tensor, inputs: Sequence[Tensor], found: Sequence[Tensor], scale: float) -> None:
        """Adds the gradients of the inputs q, k and v to ``found``."""
        groups = inputs[1].shape[1]
        q, k, v = (part.take(x, groups) for part, x in zip((self.queries, self.keys, self.keys), inputs, strict=True))
        taken = self.queries.take(grad, groups)
        if self.queries.filling is not None:
            documents, queries = self.queries.shape
            taken.view(documents, -1, queries, taken.shape[-1]).masked_fill_(self.queries.filling[:, None, :, None], 0)
        weights = self.weights(q, k, scale)
        self.keys.put(torch.bmm(weights.transpose(1, 2), taken), found[2], groups, add=True)
        of_weights = torch.bmm(taken, v.transpose(1, 2))
        along = (of_weights * weights).sum(-1, keepdim=True)
        of_scores = of_weights.sub_(along).mul_(weights).mul_(scale)
        self.queries.put(torch.bmm(of_scores, k), found[0], groups)
        self.keys.put(torch.bmm(of_scores.transpose(1, 2), q), found[1], groups, add=True)


class SpanAttention:
    """Scaled dot-product attention inside each document; cost is the sum of the squared document lengths.

    Args:
        document_ids: [B, L].
        image_ids: [B, L].
        rule: registered name of the mask rule.
        window: how many tokens back a query attends (``masks.rule_of``); ``None``: all.
        token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
        known: what the CPU knows of the tokens, so that their device is not asked for it.
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
        device = document_ids.device
        if known is not None:
            document_ids, image_ids, token_kinds = (
                known.ids[name] for name in ("document_ids", "image_ids", "token_kinds")
            )
        buckets = make_buckets(document_ids, image_ids, rule, window, token_kinds=token_kinds)
        self.buckets = [bucket.to(device) for bucket in buckets]

    @cached_property
    def units(self) -> list[Unit]:
        """All pairs of query and key, in units."""
        return [unit for bucket in self.buckets for unit in bucket.units()]

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Documents differ from batch to batch, so a compiler would compile this again for every one."""
        return self.over(_as_they_are, (q, k), v, scale)

    def over(self, compute: Compute, inputs: Sequence[Tensor], v: Tensor, scale: float) -> Tensor:
        """Attention with ``q, k = compute(*inputs)``, of which only the inputs are kept; see :class:`Attend`."""
        if v.is_cuda or (v.dtype in HALF and any(bucket.index.shape[1] >= FUSED for bucket in self.buckets)):
            q, k = compute(*inputs)
            return self._by_bucket(q, k, v, scale)
        return _Attention.apply(compute, self, scale, v, *inputs)

    def _by_bucket(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """By torch's SDPA."""
        count, length = q.shape[:2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        out = v.new_zeros(count * length, q.shape[1], v.shape[-1])
        for bucket in self.buckets:
            part = sdpa(bucket.gather(q), bucket.gather(k), bucket.gather(v), bucket.mask, scale)
            target, source = bucket.real
            out = out.index_copy(0, target, part.flatten(0, 1).index_select(0, source).to(out.dtype))
        return out.unflatten(0, (count, length))


def _as_they_are(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, spans: SpanAttention, scale: float, v: Tensor, *inputs: Tensor) -> Tensor:
        ctx.compute, ctx.spans, ctx.scale = compute, spans, scale
        ctx.save_for_backward(v, *inputs)
        with torch.autocast(v.device.type, enabled=False):
            q, k = compute(*inputs)
            out = v.new_zeros(v.shape[0] * v.shape[1], q.shape[2], v.shape[3])
            for unit in spans.units:
                unit.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out, scale)
            return out.view(*q.shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        v, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:]
        with torch.autocast(v.device.type, enabled=False):
            rotated, leaves = again(ctx.compute, inputs, needed)
            q, k = (x.detach() for x in rotated)
            flat = [x.flatten(0, 1) for x in (q, k, v)]
            found = [torch.zeros_like(x, dtype=torch.float32 if x.dtype in HALF else x.dtype) for x in flat]
            for unit in ctx.spans.units:
                unit.backward(grad.flatten(0, 1), flat, found, ctx.scale)
            of_q, of_k, of_v = (new.view_as(old).to(old.dtype) for new, old in zip(found, (q, k, v), strict=True))
            grads: Sequence[Tensor] = ()
            if leaves:
                pairs = [(x, g) for x, g in zip(rotated, (of_q, of_k), strict=True) if x.requires_grad]
                grads = torch.autograd.grad([x for x, _ in pairs], leaves, [g for _, g in pairs])
        return None, None, None, of_v if ctx.needs_input_grad[3] else None, *spread(grads, needed)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Torch's SDPA on [n, m, heads, channels]; ``mask`` ``None`` means causal. Returns [n, m, N, E]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    width = v.shape[-1]
    # The fused kernels require values as wide as keys; the unfused path forms every score, and keeps them for the
    # backward pass; short documents have few.
    if q.shape[-2] >= FUSED and not q.is_cuda:
        v = F.pad(v, (0, q.shape[-1] - width))
    grouped = q.shape[1] != k.shape[1]
    if q.is_cuda:
        # On CUDA the causal kernel takes groups of heads, and values as wide as keys; the one that takes a mask takes
        # neither, but narrower values. What no kernel takes would form every score.
        if mask is None and q.dtype in HALF:
            v = F.pad(v, (0, q.shape[-1] - width))
        elif grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            grouped = False
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return out[..., :width].transpose(1, 2)


def make_buckets(
    document_ids: Tensor,
    image_ids: Tensor,
    rule: str | RuleName,
    window: int | None = None,
    one: bool = False,
    token_kinds: Tensor | None = None,
) -> list[Bucket]:
    """Groups the documents of a batch by length, so that filling stays below an eighth for those over 64 tokens.

    Args:
        document_ids: [B, L].
        image_ids: [B, L].
        rule: registered name of the mask rule.
        window: how many tokens back a query attends; ``None``: all.
        one: put all documents into a single bucket, in order.
        token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
    """
    groups: dict[int, list[Span]] = {}
    for span in document_spans(document_ids):
        groups.setdefault(0 if one else _rounded(span.length), []).append(span)
    kinds = kinds_of(image_ids) if token_kinds is None else token_kinds
    return [_bucket(group, image_ids, kinds, rule, window) for group in groups.values()]


def _rounded(length: int) -> int:
    """The next size at which a bucket ends: multiples of 8, above 64 eight steps per octave."""
    step = max(8, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _bucket(spans: list[Span], image_ids: Tensor, kinds: Tensor, rule: str | RuleName, window: int | None) -> Bucket:
    device, seq_len = image_ids.device, image_ids.shape[1]
    starts = torch.tensor([span.sequence * seq_len + span.start for span in spans], device=device)
    lengths = torch.tensor([span.length for span in spans], device=device)
    offset = torch.arange(max(span.length for span in spans), device=device)
    index = starts[:, None] + torch.where(offset < lengths[:, None], offset, 0)
    if window is not None and window >= len(offset):
        window = None
    return Bucket(index, lengths, image_ids.flatten()[index], kinds.flatten()[index], rule, window)
