"""An auxiliary loss that draws visual tokens to the word embeddings of the answers about their image.

The answers of a document are few tokens, so the language model's loss teaches the pre-Buffer little about each image.
This loss is computed from the visual tokens themselves, as they enter the language model: the mean of their directions
must point to the word embeddings of the answers' tokens, and their norm must be that of words. Bridges to other
language models are fitted on word embeddings, so they fit visual tokens that lie there.

Predicting the words of a text from pooled features: Joulin et al. 2016 (arXiv 1511.02251). Scores are corrected by how
often a token occurs (Menon et al. 2021, arXiv 2007.07314), so that what all images share is not learned again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
SAMPLED = 8192
"""Word embeddings of which the mean and the median norm are taken, evenly spaced in the vocabulary."""
LENGTH_WEIGHT = 0.2
"""Weight of the squared logarithm of the ratio of a visual token's norm to that of words."""


@dataclass(frozen=True)
class ImageAnswers:
    """The answers about the images of a batch, found on the CPU.

    Args:
        words: [K] int64, distinct tokens of answers that are not common.
        hits: [D, K] float32, the fraction of each token among the distinct ones of a document; rows sum to 1.
        frequency: [K] float32, fraction of the documents that have the token.
        visual: [n] int64, indices of the visual tokens of these documents in the flattened batch.
        document: [n] int64, row of the document of each.
    """

    words: Tensor
    hits: Tensor
    frequency: Tensor
    visual: Tensor
    document: Tensor

    @classmethod
    def of(cls, batch: Batch) -> ImageAnswers | None:
        """``None`` if no answer belongs to an image."""
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
        kept = hits[:, rare].any(1)
        if not kept.any():
            return None
        frequency, hits = hits.mean(0)[rare], hits[kept][:, rare]
        documents = documents[kept]
        visual = visual[torch.isin(document[visual], documents)]
        hits /= hits.sum(1, keepdim=True)
        return cls(words[rare], hits, frequency, visual, torch.searchsorted(documents, document[visual]))

    def to(self, device: torch.device) -> ImageAnswers:
        """There, without waiting for it."""
        return ImageAnswers(**{name: sent(column, device) for name, column in vars(self).items()})


def word_alignment(x: Tensor, answers: ImageAnswers, embeddings: Tensor, center: Tensor, norm: Tensor) -> Tensor:
    """The loss of the visual tokens of a batch.

    Args:
        x: [B, L, D], what enters the language model.
        answers: of the same batch, on the device of ``x``.
        embeddings: [K, D] word embeddings of ``answers.words``.
        center: [D], mean word embedding.
        norm: scalar, median norm of word embeddings.

    Returns:
        Scalar float32: mean cross entropy of the documents, and ``LENGTH_WEIGHT`` times the length's term.
    """
    tokens = x.flatten(0, 1).index_select(0, answers.visual).float()
    words = F.normalize(embeddings.float() - center, dim=-1)
    pooled = words.new_zeros(len(answers.hits), x.shape[-1]).index_add(0, answers.document, F.normalize(tokens, dim=-1))
    scores = F.normalize(pooled, dim=-1) @ words.T / TEMPERATURE + answers.frequency.log()
    entropy = -(answers.hits * scores.log_softmax(-1)).sum(1).mean()
    length = (tokens.norm(dim=-1).clamp(min=1e-6).log() - norm.log()).square().mean()
    return entropy + LENGTH_WEIGHT * length


class WordAlignment:
    """Computes the loss beside a model's own, from what entered the language model in the same forward pass.

    Args:
        model: in training.
    """

    def __init__(self, model: NEO) -> None:
        self.model = model
        self._entered: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps what enters the language model in a forward pass inside this context, for :meth:`loss`."""

        def keep(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            self._entered = arguments[0]

        hook = self.model.post_llm.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def loss(self, batch: Batch) -> Tensor | None:
        """The loss of the batch that was computed under :meth:`watching`; ``None`` if no answer belongs to an image."""
        x, self._entered = self._entered, None
        answers = ImageAnswers.of(batch)
        if x is None or answers is None:
            return None
        answers = answers.to(x.device)
        llm = self.model.post_llm
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            # In every step: word embeddings may be trained, and a resumed run must go on as if it had not ended.
            rows = torch.arange(0, llm.hparams.vocab_size, max(1, llm.hparams.vocab_size // SAMPLED), device=x.device)
            table = llm.embed(rows).float()
            words = llm.embed(answers.words).float()
        with torch.autocast(x.device.type, enabled=False):
            return word_alignment(x, answers, words, table.mean(0), table.norm(dim=-1).median())
