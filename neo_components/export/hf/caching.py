"""Attention of one block over the keys and values that a cache of transformers holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neo_components.components.backends import prepare_attention
from neo_components.components.block_inputs import Attend
from neo_components.components.document_attention import sdpa
from neo_components.components.masks import LayerRule, dense_mask
from neo_components.export.hf.rows import Rows
from neo_components.token_indices import document_spans


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


def cached_attention(rows: Rows, new: int, rules: Sequence[LayerRule], cache: Any, backend: str) -> list[Attend]:
    """The attention of every block.

    Args:
        rows: all tokens, those in the cache first.
        new: how many of them are new.
        rules: whom the tokens of each block see.
        cache: see :class:`CachedAttention`.
        backend: for new tokens without any before them.
    """
    documents, images = rows.document_ids, rows.image_ids
    # The backends take each unbroken run of tokens as a document of its own.
    runs = [span.sequence for span in document_spans(documents)] if new == documents.shape[1] else []
    attends: dict[LayerRule, Attend | None] = dict.fromkeys(rules)
    masks: dict[LayerRule, Tensor | None] = dict.fromkeys(rules)
    for rule in attends:
        if 0 < len(runs) == len(set(runs)):
            attends[rule] = prepare_attention(documents, images, rule.rule, backend, rule.window, rows.token_kinds)
        else:
            masks[rule] = dense_mask(documents, images, rule.rule, rule.window, new, rows.token_kinds)[:, None]
    return [CachedAttention(cache, number, attends[rule], masks[rule]) for number, rule in enumerate(rules)]
