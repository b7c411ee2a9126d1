"""Where text goes: through the pre-Buffer like the images (NEO), or around it.

A route selects the tokens that pass the pre-Buffer and defines how these attend to each other there. The model, its
exports and the estimates of its cost use the same route.

Source: NEO paper section 3.2 (``shared``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neo_components.errors import one_of
from neo_components.token_indices import Index, TokenIndices, sent
from neo_components.types import FILLING, NO_IMAGE, Batch, TokenKind, tokens_around

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
        known: what the CPU knows of them; ``None``: nothing.

    Where ``index`` selects, and on a device, padding may follow the n tokens.
    """

    index: Tensor | None
    token_ids: Tensor
    positions: Tensor
    document_ids: Tensor
    image_ids: Tensor
    token_kinds: Tensor
    known: TokenIndices | None


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
        if self.words_pass:
            columns = (batch.token_ids, batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds)
            return Passing(None, *columns, batch.known)
        ids = batch.indices.ids
        documents = self.documents(ids["document_ids"], ids["image_ids"], ids["token_kinds"])
        chosen = torch.from_numpy(np.flatnonzero(documents.numpy() >= 0))
        return _select(ids, documents, chosen, batch.token_ids.device)

    def one_token(self, batch: Batch) -> Passing:
        """Any one token of a batch of which none passes: for processes that must all compute the same parts."""
        ids = batch.indices.ids
        own = torch.zeros_like(ids["document_ids"])  # that of padding would attend to nothing, not even to itself
        return _select(ids, own, torch.zeros(1, dtype=torch.int64), batch.token_ids.device)


LENGTHS = 4
"""Different lengths to which the selected tokens of batches of one shape are padded on a device: compiled blocks are
compiled once for each."""


def _select(ids: Mapping[str, Tensor], documents: Tensor, chosen: Tensor, device: torch.device) -> Passing:
    """Selected tokens of a batch as one sequence; images are numbered by their documents, as each sequence numbers its
    images from 0. All is done on the CPU, where it is known what is selected."""
    columns = {name: ids[name].flatten(0, 1)[chosen] for name in ("token_ids", "positions", "image_ids", "token_kinds")}
    columns["document_ids"] = documents.flatten()[chosen]
    words = columns["image_ids"] == NO_IMAGE
    columns["image_ids"] = torch.where(words, columns["image_ids"], columns["document_ids"])
    if device.type != "cpu":
        step = -(-documents.numel() // LENGTHS)
        more = -len(chosen) % step
        columns = {name: torch.cat([c, c.new_full((more, *c.shape[1:]), FILLING[name])]) for name, c in columns.items()}
    columns = {name: column[None] for name, column in columns.items()}
    visual = Index.of(columns["image_ids"] != NO_IMAGE)

    def there(x: Tensor) -> Tensor:
        return sent(x, device)

    known = TokenIndices(columns, {"visual": visual.map(there)})
    return Passing(there(chosen), known=known, **{name: there(column) for name, column in columns.items()})
