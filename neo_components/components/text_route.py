"""Where text goes: through the pre-Buffer like the images (NEO), or around it.

A route selects the tokens that pass the pre-Buffer and defines how these attend to each other there. The model, its
exports and the estimates of its cost use the same route.

Source: NEO paper section 3.2 (``shared``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neo_components.errors import one_of
from neo_components.types import NO_IMAGE, Batch, TokenKind, tokens_around

SHARED, BYPASS = "shared", "bypass"
TEXT = (SHARED, BYPASS)
"""``shared``: words and images pass the pre-Buffer together (NEO paper). ``bypass``: each image passes it alone with
its two boundary tokens, and words reach the language model untouched."""


@dataclass(frozen=True)
class Passing:
    """The tokens of a batch that pass the pre-Buffer.

    Args:
        index: [n] int64, their indices in the flattened [B * L] batch; ``None``: all tokens as they are.
        token_ids: [b, l], and so the other columns; [1, n] where ``index`` selects.
        positions: [b, l, 3].
        document_ids: [b, l].
        image_ids: [b, l].
        token_kinds: [b, l].
    """

    index: Tensor | None
    token_ids: Tensor
    positions: Tensor
    document_ids: Tensor
    image_ids: Tensor
    token_kinds: Tensor


class TextRoute:
    """One of :data:`TEXT`.

    Args:
        text: its name.

    Raises:
        ArgumentError: (a ``ValueError``) if there is no such route.
    """

    def __init__(self, text: str) -> None:
        one_of("text", text, TEXT)
        self.text = text

    @property
    def words_pass(self) -> bool:
        """Whether words pass the pre-Buffer."""
        return self.text == SHARED

    def documents(self, document_ids: Tensor, image_ids: Tensor, token_kinds: Tensor) -> Tensor:
        """[B, L]: the documents that tokens belong to inside the pre-Buffer; ``-1`` for padding and for tokens that do
        not pass it.

        With ``bypass``, each image with its boundary tokens is a document, numbered differently in every sequence. A
        boundary token without an image is one too.
        """
        if self.words_pass:
            return document_ids
        length = image_ids.shape[1]
        own = tokens_around(image_ids, token_kinds)
        index = torch.arange(length, device=own.device).expand_as(own)
        own = torch.where((token_kinds == TokenKind.BOUNDARY) & (own == NO_IMAGE), length + index, own)
        sequence = torch.arange(len(own), device=own.device)[:, None]
        return torch.where(own == NO_IMAGE, own, own + 2 * length * sequence)

    def passing(self, batch: Batch) -> Passing:
        """The tokens of a batch that pass the pre-Buffer."""
        columns = (batch.token_ids, batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds)
        if self.words_pass:
            return Passing(None, *columns)
        documents = self.documents(batch.document_ids, batch.image_ids, batch.token_kinds)
        index = (documents >= 0).flatten().nonzero()[:, 0]
        return _select(batch, documents, index)

    def one_token(self, batch: Batch) -> Passing:
        """Any one token of a batch of which none passes: for processes that must all compute the same parts."""
        own = torch.zeros_like(batch.document_ids)  # that of padding would attend to nothing, not even to itself
        return _select(batch, own, torch.zeros(1, dtype=torch.int64, device=own.device))


def _select(batch: Batch, documents: Tensor, index: Tensor) -> Passing:
    """Selected tokens of a batch as one sequence; images are numbered by their documents, as each sequence numbers its
    images from 0."""
    ids, positions, own, image_ids, kinds = (
        column.flatten(0, 1)[index][None]
        for column in (batch.token_ids, batch.positions, documents, batch.image_ids, batch.token_kinds)
    )
    return Passing(index, ids, positions, own, torch.where(image_ids == NO_IMAGE, image_ids, own), kinds)
