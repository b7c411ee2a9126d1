"""Who sees whom: the mask rule, written once and rendered three ways.

A rule says, elementwise, whether a query sees a key. It is rendered as a dense boolean matrix (:func:`dense_mask`),
as a FlexAttention BlockMask (:func:`block_mask`), and per document (:func:`document_spans`, :func:`span_mask`), so
that the cost of a packed row grows with the documents and not with the square of the row.

A layer may have a window: there a query sees only the last tokens of what its rule shows it (:func:`seeing`).

Source: NEO paper section 3.1 (mixed attention); sliding windows as in Mistral and Gemma 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from neo_components.types import NO_IMAGE, PADDING

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Tokens:
    """What a rule may ask of a token: its document, its image (``-1``: none) and its place in the row."""

    document: Tensor
    image: Tensor
    place: Tensor


MaskRule = Callable[[Tokens, Tokens], Tensor]


class LayerRule(NamedTuple):
    """Whom the tokens of one layer see: the registered name of a rule, and a window or ``None``."""

    rule: str
    window: int | None = None


MASK_RULES: dict[str, MaskRule] = {}


def register_mask(name: str) -> Callable[[MaskRule], MaskRule]:
    """Decorator that enters a rule under the short name that recipes use (``attention: name``)."""

    def enter(rule: MaskRule) -> MaskRule:
        MASK_RULES[name] = rule
        return rule

    return enter


def mask_rule(name: str) -> MaskRule:
    """The rule of that name.

    Raises:
        ValueError: if no rule has that name.
    """
    if name not in MASK_RULES:
        raise ValueError(
            f"attention {name!r} is unknown; registered: {', '.join(sorted(MASK_RULES))}; if it is your own, import "
            "the module that registers it (neo ... --import MODULE)"
        )
    return MASK_RULES[name]


@register_mask("mixed")
def mixed(query: Tokens, key: Tokens) -> Tensor:
    """Same document, and the key not later or both visual tokens of the same image."""
    same_image = (query.image == key.image) & (query.image != NO_IMAGE)
    return (query.document == key.document) & ((query.place >= key.place) | same_image)


@register_mask("causal")
def causal(query: Tokens, key: Tokens) -> Tensor:
    """Same document and the key not later."""
    return (query.document == key.document) & (query.place >= key.place)


def seeing(rule: str, window: int | None = None) -> MaskRule:
    """A rule under a window: of what it shows, a query sees the last ``window`` tokens, itself included.

    Distance is counted in tokens of the row, as in transformers (``key > query - window``). A window does not cut
    through an image: whatever the rule shows a visual token of its own image stays seen.
    """
    see = mask_rule(rule)
    if window is None:
        return see

    def within(query: Tokens, key: Tokens) -> Tensor:
        same_image = (query.image == key.image) & (query.image != NO_IMAGE)
        return see(query, key) & ((query.place - key.place < window) | same_image)

    return within


def dense_mask(
    document_ids: Tensor,
    image_ids: Tensor,
    rule: str = "mixed",
    window: int | None = None,
    queries: int | None = None,
) -> Tensor:
    """The whole matrix, or its last rows.

    Args:
        document_ids: [B, L].
        image_ids: [B, L].
        rule: registered name.
        window: see :func:`seeing`.
        queries: give only the rows of the last so many tokens.

    Returns:
        [B, L, L] or [B, queries, L] bool, ``True`` where the query (row) sees the key (column).
    """
    length = document_ids.shape[-1]
    place = torch.arange(length, device=document_ids.device).expand_as(document_ids)
    rows = slice(length - (length if queries is None else queries), length)
    query = Tokens(document_ids[..., rows, None], image_ids[..., rows, None], place[..., rows, None])
    key = Tokens(document_ids[..., None, :], image_ids[..., None, :], place[..., None, :])
    return seeing(rule, window)(query, key)


def block_mask(
    document_ids: Tensor,
    image_ids: Tensor,
    rule: str = "mixed",
    window: int | None = None,
    compiled: bool | None = None,
) -> BlockMask:
    """The rule as FlexAttention wants it; arguments as in :func:`dense_mask`.

    Args:
        compiled: whether it is built by a compiled function, which never forms the [B, L, L] matrix; ``None``: on CUDA.
    """
    see = seeing(rule, window)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query = Tokens(document_ids[b, q], image_ids[b, q], q)
        key = Tokens(document_ids[b, k], image_ids[b, k], k)
        return see(query, key)

    rows, length = document_ids.shape
    create = _create_block_mask(document_ids.is_cuda if compiled is None else compiled)
    return create(mask_mod, rows, None, length, length, device=str(document_ids.device))


@lru_cache(maxsize=2)
def _create_block_mask(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask


@dataclass(frozen=True)
class Span:
    """One document's place: row, first token and number of tokens."""

    row: int
    start: int
    length: int


def document_spans(document_ids: Tensor) -> list[Span]:
    """The runs of equal document ids of [B, L], row by row; padding is left out."""
    spans = []
    for row, ids in enumerate(document_ids.cpu()):
        values, lengths = torch.unique_consecutive(ids, return_counts=True)
        start = 0
        for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
            if value != PADDING:
                spans.append(Span(row, start, length))
            start += length
    return spans


def span_mask(image_ids: Tensor, lengths: Tensor, rule: str = "mixed", window: int | None = None) -> Tensor:
    """The rule inside documents that lie one per row, aligned left.

    Args:
        image_ids: [n, m]; what lies beyond a document's length is not looked at.
        lengths: [n] tokens of each document.
        rule: registered name.
        window: see :func:`seeing`.

    Returns:
        [n, m, m] bool. Filling sees itself, so that no row of the softmax is empty.
    """
    place = torch.arange(image_ids.shape[-1], device=image_ids.device)
    filling = place >= lengths[:, None]
    document_ids = torch.where(filling, place, torch.full_like(place, PADDING))
    return dense_mask(document_ids, image_ids.masked_fill(filling, NO_IMAGE), rule, window)
