"""The training loss by source and by modality of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neo_components.token_indices import sent
from neo_components.types import Batch

MODALITIES = ("text", "image", "images")
"""Samples without an image, with one image, and with several images or a video."""


class LossParts:
    """Weighted sums over the target tokens of all added batches, by source and by modality.

    The loss of a source or modality is ``sum(w * nll) / sum(w)`` over its tokens. The mean of the sources' losses,
    weighted by their ``sum(w)``, is the total loss; the same is true of the modalities.

    Args:
        sources: names of the sources; tokens of other sources count by modality only.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = list(dict.fromkeys(sources))
        self.names = [f"loss_by_source/{name}" for name in self.sources]
        self.names += [f"loss_by_modality/{name}" for name in MODALITIES]
        self._sums: Tensor | None = None

    def add(self, batch: Batch, nll: Tensor) -> None:
        """Adds one batch.

        Args:
            batch: packed sequences.
            nll: [n], negative log-likelihood of each target token, from ``NEO.loss``.
        """
        index = batch.indices.targets.exact
        weight = batch.loss_weights.flatten().index_select(0, index).double()
        tables = sent(self._tables(batch), nll.device)
        rows = index // batch.token_ids.shape[1]
        documents = batch.document_ids.flatten().index_select(0, index).clamp(min=0)
        if self._sums is None:
            self._sums = self._empty(nll.device)
        values = torch.stack([nll.double() * weight, weight], dim=1)
        for table in tables:
            self._sums.index_add_(0, table.flatten()[rows * table.shape[1] + documents], values)

    def _tables(self, batch: Batch) -> Tensor:
        """[2, B, documents]: index of each document's source and of its modality among the sums."""
        unnamed, rows = len(self.names), len(batch.token_ids)
        width = max(map(len, batch.image_counts), default=0) + 1
        indices = {name: index for index, name in enumerate(self.sources)}
        found = torch.full((2, rows, width), unnamed)
        for row, (names, counts) in enumerate(zip(batch.sources, batch.image_counts, strict=True)):
            for document, (name, count) in enumerate(zip(names, counts, strict=True)):
                found[0, row, document] = indices.get(name, unnamed)
                found[1, row, document] = len(self.sources) + min(count, len(MODALITIES) - 1)
        return found

    def _empty(self, device: torch.device) -> Tensor:
        """[names + 1, 2]; the last row is for tokens of unnamed sources."""
        return torch.zeros(len(self.names) + 1, 2, dtype=torch.float64, device=device)

    def take(self, device: torch.device, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The losses since the last call, by name, of sources and modalities that had target tokens. Resets the sums.

        Args:
            device: of the training, used if nothing was added.
            add_up: sums a tensor over all processes.
        """
        sums = add_up(self._empty(device) if self._sums is None else self._sums)[:-1].tolist()
        self._sums = None
        return {name: total / weight for name, (total, weight) in zip(self.names, sums, strict=True) if weight > 0}
