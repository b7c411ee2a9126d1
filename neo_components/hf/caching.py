"""Attention of one block over the keys and values that a cache of transformers holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neo_components.components.backends import Attend, prepare_attention, sdpa
from neo_components.components.masks import dense_mask, document_spans
from neo_components.hf.rows import Rows


class CachedAttention:
    """One block's part of a cache; an ``Attend``. Keys are twice as wide as values, which the caches do not mind.

    Args:
        cache: of transformers; ``None`` to keep nothing.
        number: of the block in the whole model.
        attend: computes attention among the new tokens, if they are all there are.
        mask: [B, 1, L, S] which keys the new tokens see, otherwise.
    """

    def __init__(self, cache: Any, number: int, attend: Attend | None, mask: Tensor | None) -> None:
        self.cache, self.number, self.attend, self.mask = cache, number, attend, mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys, values = k, v
        if self.cache is not None:
            kept = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.number)
            keys, values = (x.transpose(1, 2) for x in kept)
        if self.attend is not None:
            return self.attend(q, k, v, scale)
        return sdpa(q, keys, values, self.mask, scale)


def cached_attention(rows: Rows, new: int, rules: list[str], cache: Any, backend: str) -> list[Attend]:
    """The attention of every block.

    Args:
        rows: all tokens, those in the cache first.
        new: how many of them are new.
        rules: mask rule of each block.
        cache: see :class:`CachedAttention`.
        backend: for new tokens without any before them.
    """
    documents, images = rows.document_ids, rows.image_ids
    attends: dict[str, Attend | None] = {}
    masks: dict[str, Tensor | None] = {}
    # The backends take each unbroken run of tokens as a document of its own.
    runs = [span.row for span in document_spans(documents)] if new == documents.shape[1] else []
    fresh = 0 < len(runs) == len(set(runs))
    for rule in set(rules):
        attends[rule] = prepare_attention(documents, images, rule, backend) if fresh else None
        masks[rule] = None if fresh else dense_mask(documents, images, rule, new)[:, None]
    return [CachedAttention(cache, number, attends[rule], masks[rule]) for number, rule in enumerate(rules)]
