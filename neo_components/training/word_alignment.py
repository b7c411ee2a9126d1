"""An auxiliary loss that draws what a pre-Buffer makes of images to the words that are said of them.

The answers of a document are few tokens, and the language model's loss tells the pre-Buffer little of each image. This
loss asks the visual tokens themselves, as they enter the language model: the mean of their directions must point to the
word embeddings of the answers' tokens, and their length must be that of words. A pre-Buffer that was trained so speaks
in word embeddings, which every bridge to another language model is fitted on.

Predicting the words of a text from pooled features: Joulin et al. 2016 (arXiv 1511.02251). Scores are corrected by how
often a token occurs (Menon et al. 2021, arXiv 2007.07314), so that what all images share is not learned again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_components.model.neo import NEO
from neo_components.token_indices import sent
from neo_components.types import IGNORED, NO_IMAGE, Batch

TEMPERATURE = 0.07
"""Of the cosines (Radford et al. 2021, arXiv 2103.00020, start of CLIP's)."""
COMMON = 0.15
"""A token that more of the batch's documents answer with is no word of an image: ``yes``, ``a``, the end of a turn."""
LENGTH_WEIGHT = 0.2
"""Weight of the squared logarithm of the ratio of a visual token's norm to that of words."""


@dataclass(frozen=True)
class Said:
    """What is said of the images of a batch, found on the CPU.

    Args:
        words: [K] int64, distinct tokens of answers that are not common.
        hits: [D, K] float32, row by row the share of each in what is said of a document; a row sums to 1.
        frequency: [K] float32, share of the documents that have the token.
        visual: [n] int64, indices of the visual tokens of these documents in the flattened batch.
        document: [n] int64, row of the document of each.
    """

    words: Tensor
    hits: Tensor
    frequency: Tensor
    visual: Tensor
    document: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Said | None:
        """``None`` if nothing is said of any image."""
        ids = batch.indices.ids
        length = ids["document_ids"].shape[1]
        rows = torch.arange(len(ids["document_ids"]), device="cpu")[:, None]
        document = (ids["document_ids"] + rows * length).flatten()
        visual = (ids["image_ids"] != NO_IMAGE).flatten().nonzero()[:, 0]
        answered = (ids["labels"] != IGNORED).flatten().nonzero()[:, 0]
        answered = answered[torch.isin(document[answered], document[visual])]
        if not len(answered):
            return None
        documents, row = document[answered].unique(return_inverse=True)
        words, column = ids["labels"].flatten()[answered].unique(return_inverse=True)
        hits = torch.zeros(len(documents), len(words), device="cpu")
        hits[row, column] = 1.0
        rare = hits.mean(0) <= max(COMMON, 1 / len(documents))
        told = hits[:, rare].any(1)
        if not told.any():
            return None
        frequency, hits = hits.mean(0)[rare], hits[told][:, rare]
        documents = documents[told]
        visual = visual[torch.isin(document[visual], documents)]
        hits /= hits.sum(1, keepdim=True)
        return cls(words[rare], hits, frequency, visual, torch.searchsorted(documents, document[visual]))

    def to(self, device: torch.device) -> Said:
        """There, without waiting for it."""
        return Said(**{name: sent(column, device) for name, column in vars(self).items()})


def word_alignment(x: Tensor, said: Said, embeddings: Tensor, center: Tensor, norm: Tensor) -> Tensor:
    """The loss of the visual tokens of a batch.

    Args:
        x: [B, L, D], what enters the language model.
        said: of the same batch, on the device of ``x``.
        embeddings: [K, D] word embeddings of ``said.words``.
        center: [D], mean word embedding.
        norm: scalar, median norm of word embeddings.

    Returns:
        Scalar float32: mean cross entropy of the documents, and ``LENGTH_WEIGHT`` times the length's term.
    """
    tokens = x.flatten(0, 1).index_select(0, said.visual).float()
    words = F.normalize(embeddings.float() - center, dim=-1)
    pooled = words.new_zeros(len(said.hits), x.shape[-1]).index_add(0, said.document, F.normalize(tokens, dim=-1))
    scores = F.normalize(pooled, dim=-1) @ words.T / TEMPERATURE + said.frequency.log()
    entropy = -(said.hits * scores.log_softmax(-1)).sum(1).mean()
    length = (tokens.norm(dim=-1).clamp(min=1e-6).log() - norm.log()).square().mean()
    return entropy + LENGTH_WEIGHT * length


class WordAlignment:
    """Computes the loss beside a model's own: it sees what enters the language model in the same forward pass.

    Args:
        model: in training; word embeddings are taken as they are when it starts.
    """

    def __init__(self, model: NEO) -> None:
        self.model = model
        self._seen: list[Tensor] = []
        self._words: tuple[Tensor, Tensor] | None = None
        model.post_llm.register_forward_pre_hook(self._see)

    def _see(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self._seen = [arguments[0]]

    @torch.no_grad()
    def _word_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and median norm of the word embeddings."""
        if self._words is None:
            table = self.model.post_llm.word_embedding.weight
            rows = torch.arange(0, len(table), max(1, len(table) // 8192), device=table.device)
            vectors = self.model.post_llm.embed(rows).float()
            self._words = vectors.mean(0), vectors.norm(dim=-1).median()
        return self._words

    def loss(self, batch: Batch) -> Tensor | None:
        """The loss of the batch that the model has just computed; ``None`` if nothing is said of any image."""
        (x,), self._seen = self._seen, []
        said = Said.of(batch)
        if said is None:
            return None
        said = said.to(x.device)
        with torch.no_grad():
            embeddings = self.model.post_llm.embed(said.words)
        with torch.autocast(x.device.type, enabled=False):
            return word_alignment(x, said, embeddings, *self._word_statistics())
