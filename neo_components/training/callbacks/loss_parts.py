"""The training loss told apart: by the source of a sample and by what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from neo_components.types import IGNORED, Batch

MODALITIES = ("text", "image", "images")
"""Samples without an image, with one, and with several or a video."""


class LossParts:
    """Weighted sums over the learnt tokens of every batch added, in two tables: one by source, one by modality.

    A part's loss is ``sum(w * nll) / sum(w)`` over its tokens: weighted by their ``sum(w)``, the losses of the sources
    give that of the whole, and so do those of the modalities.

    Args:
        sources: names of the sources; tokens of others count by modality only.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = list(dict.fromkeys(sources))
        self.names = [f"loss_by_source/{name}" for name in self.sources]
        self.names += [f"loss_by_modality/{name}" for name in MODALITIES]
        self._sums: Tensor | None = None

    def add(self, batch: Batch, nll: Tensor) -> None:
        """Counts one batch.

        Args:
            batch: packed rows.
            nll: [n], of each learnt token, as ``NEO.loss`` tells it.
        """
        learnt = batch.labels[:, 1:] != IGNORED
        weight = batch.loss_weights[:, 1:][learnt].double()
        tables = self._tables(batch).to(nll.device)
        documents = batch.document_ids[:, 1:].clamp(min=0)
        if self._sums is None:
            self._sums = self._empty(nll.device)
        values = torch.stack([nll.double() * weight, weight], dim=1)
        for table in tables:
            self._sums.index_add_(0, table.gather(1, documents)[learnt], values)

    def _tables(self, batch: Batch) -> Tensor:
        """[2, B, documents]: the place of each document's source and of its modality among the sums."""
        nowhere, rows = len(self.names), len(batch.token_ids)
        width = max(map(len, batch.image_counts), default=0) + 1
        places = {name: place for place, name in enumerate(self.sources)}
        found = torch.full((2, rows, width), nowhere)
        for row, (names, counts) in enumerate(zip(batch.sources, batch.image_counts, strict=True)):
            for document, (name, count) in enumerate(zip(names, counts, strict=True)):
                found[0, row, document] = places.get(name, nowhere)
                found[1, row, document] = len(self.sources) + min(count, len(MODALITIES) - 1)
        return found

    def _empty(self, device: torch.device) -> Tensor:
        """[parts + 1, 2]; the last one takes what is no part."""
        return torch.zeros(len(self.names) + 1, 2, dtype=torch.float64, device=device)

    def take(self, device: torch.device, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The loss of every part that had a learnt token since the last call, by name; counting begins anew.

        Args:
            device: of the training, needed where nothing was added.
            add_up: adds a tensor over all processes.
        """
        sums = add_up(self._empty(device) if self._sums is None else self._sums)[:-1].tolist()
        self._sums = None
        return {name: total / weight for name, (total, weight) in zip(self.names, sums, strict=True) if weight > 0}
