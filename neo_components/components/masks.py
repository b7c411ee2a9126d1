"""Who attends to whom: a mask rule, written once and rendered three ways.

A rule (``mask_rules.py``) states, elementwise, whether a query attends to a key. It is rendered as a dense boolean
matrix (:func:`dense_mask`), as a FlexAttention BlockMask (:func:`block_mask`), and per document
(``document_attention.py``, :func:`span_mask`), so that the cost of a packed sequence grows with its documents, not with
the square of its length.

A layer may have a window: there a query attends only to the last tokens of what its rule shows it (:func:`rule_of`).

Source: NEO paper section 3.1 (mixed attention); sliding windows as in Mistral and Gemma 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from neo_components.components.compiling import compiled as compiled_whole
from neo_components.registry import MASKS, Choice, split
from neo_components.types import NO_IMAGE, PADDING, TokenKind, kinds_of, tokens_around

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Tokens:
    """The tokens that a rule compares; queries and keys come in shapes that broadcast to [..., queries, keys].

    Args:
        document: number of the document; ``-1`` for padding.
        image: number of the image that a token belongs to, its boundary tokens included; ``-1``: none.
        kind: of :class:`~neo_components.types.TokenKind`.
        position: index in the packed sequence.
    """

    document: Tensor
    image: Tensor
    kind: Tensor
    position: Tensor

    @property
    def inside(self) -> Tensor:
        """Whether a token lies between the boundary tokens of an image."""
        return (self.image != NO_IMAGE) & (self.kind != TokenKind.BOUNDARY)

    @classmethod
    def of(cls, document_ids: Tensor, image_ids: Tensor, token_kinds: Tensor | None = None) -> Tokens:
        """All tokens of [..., L] ids; ``token_kinds`` ``None``: visual tokens and text, as ``image_ids`` has them."""
        kinds = kinds_of(image_ids) if token_kinds is None else token_kinds
        position = torch.arange(document_ids.shape[-1], device=document_ids.device).expand_as(document_ids)
        return cls(document_ids, tokens_around(image_ids, kinds), kinds, position)

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        """The same with every tensor changed, for example indexed."""
        return Tokens(change(self.document), change(self.image), change(self.kind), change(self.position))


MaskRule = Callable[[Tokens, Tokens], Tensor]


class RuleName(NamedTuple):
    """A rule with options, as a key of dictionaries.

    Attributes:
        name: registered name.
        options: (name, value) pairs.
    """

    name: str
    options: tuple[tuple[str, Any], ...]


class LayerRule(NamedTuple):
    """Whom the tokens of one layer attend to: a rule, and a window or ``None``."""

    rule: str | RuleName
    window: int | None = None

    @classmethod
    def choose(cls, attention: Choice, window: int | None = None) -> LayerRule:
        """The rule that a block's ``attention`` argument chooses, with every option.

        Raises:
            ArgumentError: (a ``ValueError``) if the name or an option is unknown.
        """
        name, options = split(MASKS.complete(attention), MASKS.kind)
        return cls(RuleName(name, tuple(sorted(options.items()))) if options else name, window)


def rule_of(rule: str | RuleName, window: int | None = None) -> MaskRule:
    """The function of a rule under a window: of what it shows, a query attends to the last ``window`` tokens, itself
    included.

    Distance is counted in tokens of the sequence, as in transformers (``key > query - window``). A window does not cut
    through an image: whatever the rule shows a token of its own image stays visible.

    Raises:
        ArgumentError: (a ``ValueError``) if no rule has that name.
    """
    plain: MaskRule = MASKS[rule] if isinstance(rule, str) else partial(MASKS[rule.name], **dict(rule.options))
    if window is None:
        return plain

    def within(query: Tokens, key: Tokens) -> Tensor:
        same_image = query.inside & key.inside & (query.image == key.image)
        return plain(query, key) & ((query.position - key.position < window) | same_image)

    return within


def dense_mask(
    document_ids: Tensor,
    image_ids: Tensor,
    rule: str | RuleName = "mixed",
    window: int | None = None,
    queries: int | None = None,
    token_kinds: Tensor | None = None,
) -> Tensor:
    """The matrix of all tokens, or its last rows.

    Args:
        document_ids: [B, L].
        image_ids: [B, L].
        rule: registered name.
        window: see :func:`rule_of`.
        queries: give only the rows of the last so many tokens.
        token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.

    Returns:
        [B, L, L] or [B, queries, L] bool, ``True`` where the query (row) attends to the key (column).
    """
    tokens = Tokens.of(document_ids, image_ids, token_kinds)
    length = document_ids.shape[-1]
    rows = slice(length - (length if queries is None else queries), length)
    return rule_of(rule, window)(tokens.map(lambda x: x[..., rows, None]), tokens.map(lambda x: x[..., None, :]))


def block_mask(
    document_ids: Tensor,
    image_ids: Tensor,
    rule: str | RuleName = "mixed",
    window: int | None = None,
    compiled: bool | None = None,
    token_kinds: Tensor | None = None,
) -> BlockMask:
    """The rule as a FlexAttention BlockMask; arguments as in :func:`dense_mask`.

    Args:
        compiled: whether it is built by a compiled function, which never forms the [B, L, L] matrix; ``None``: on CUDA.
    """
    attends, tokens = rule_of(rule, window), Tokens.of(document_ids, image_ids, token_kinds)
    document, image, kind = tokens.document, tokens.image, tokens.kind

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query = Tokens(document[b, q], image[b, q], kind[b, q], q)
        return attends(query, Tokens(document[b, k], image[b, k], kind[b, k], k))

    count, length = document_ids.shape
    create = _create_block_mask(document_ids.is_cuda if compiled is None else compiled)
    return create(mask_mod, count, None, length, length, device=str(document_ids.device))


@lru_cache(maxsize=2)
def _create_block_mask(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # A second length compiles it for all lengths. As one graph: torch would go on with the whole matrix otherwise.
    return compiled_whole(create_block_mask) if compiled else create_block_mask


def span_tokens(image_ids: Tensor, lengths: Tensor, token_kinds: Tensor | None = None) -> Tokens:
    """The tokens of documents, one document to a row, aligned left; arguments as in :func:`span_mask`.

    Filling behind a document is a document of one token each, so that no row of a softmax is empty.
    """
    index = torch.arange(image_ids.shape[-1], device=image_ids.device)
    filling = index >= lengths[:, None]
    document_ids = torch.where(filling, index, torch.full_like(index, PADDING))
    kinds = None if token_kinds is None else token_kinds.masked_fill(filling, TokenKind.TEXT)
    return Tokens.of(document_ids, image_ids.masked_fill(filling, NO_IMAGE), kinds)


def span_mask(
    image_ids: Tensor,
    lengths: Tensor,
    rule: str | RuleName = "mixed",
    window: int | None = None,
    token_kinds: Tensor | None = None,
) -> Tensor:
    """The rule inside documents, one document to a row, aligned left.

    Args:
        image_ids: [n, m]; what comes after a document's length is ignored.
        lengths: [n] tokens of each document.
        rule: registered name.
        window: see :func:`rule_of`.
        token_kinds: [n, m]; ``None``: visual tokens and text, as ``image_ids`` has them.

    Returns:
        [n, m, m] bool. Filling attends to itself, so that no row of the softmax is empty.
    """
    tokens = span_tokens(image_ids, lengths, token_kinds)
    return rule_of(rule, window)(tokens.map(lambda x: x[..., :, None]), tokens.map(lambda x: x[..., None, :]))
