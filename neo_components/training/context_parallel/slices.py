"""The slice of a batch that one of several processes holds: some tokens of every packed sequence, and their patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neo_components.components.rotary import T
from neo_components.token_indices import Index, TokenIndices, sent
from neo_components.types import IGNORED, NO_IMAGE, Batch

PER_TOKEN = ("token_ids", "positions", "document_ids", "image_ids", "token_kinds", "labels", "loss_weights")
"""Columns of a batch with one entry for each token, [B, L, ...]."""


@dataclass(frozen=True)
class Slice:
    """Tokens ``start`` to ``stop`` (not included) of every sequence."""

    start: int
    stop: int

    @classmethod
    def of(cls, batch: Batch, rank: int, size: int) -> Slice:
        """The slice of process ``rank`` of ``size``; all are equally long.

        Raises:
            ValueError: if the length of the sequences is no multiple of ``size``.
        """
        length = batch.token_ids.shape[1]
        check_length(length, size)
        return cls(rank * length // size, (rank + 1) * length // size)

    def column(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, l, ...]."""
        return x[:, self.start : self.stop]

    def following(self, x: Tensor, filling: float) -> Tensor:
        """[B, L] -> [B, l]: the entry of the next token of each, which may lie in the next slice; ``filling`` for the
        sequence's last token."""
        return self.column(torch.cat([x[:, 1:], x.new_full((len(x), 1), filling)], dim=1))

    def predicting(self, batch: Batch) -> Index:
        """The tokens of this slice whose next token is a target."""
        labels = self.following(batch.indices.ids["labels"], IGNORED)
        return _on_device(labels != IGNORED, batch)

    def batch(self, batch: Batch, fold: int) -> Batch:
        """The part of a batch that this slice holds.

        Args:
            batch: the full one.
            fold: patches per side of a visual token.

        Returns:
            [B, l] and [p, ...] of the patches of its visual tokens, also where an image lies in several slices. What a
            batch knows of whole images and samples (``image_grids``, ``keys`` ...) is that of the full batch.
        """
        runs = self._visual_runs(batch.indices.ids["image_ids"] != NO_IMAGE)
        patches, positions = (
            torch.cat([x[first * fold**2 : last * fold**2] for first, last in runs])
            for x in (batch.patches, batch.patch_positions)
        )
        columns: dict[str, Any] = {name: self.column(getattr(batch, name)) for name in PER_TOKEN}
        part = replace(batch, **columns, patches=patches, patch_positions=positions)
        return part.with_indices(self._known(batch))

    def _known(self, batch: Batch) -> TokenIndices:
        """What the CPU knows of the slice. The T position of every token is the last of its document: lengths of
        documents, by which some models choose frequencies, are those of full documents."""
        full = batch.indices
        ids = {name: self.column(column) if name in PER_TOKEN else column for name, column in full.ids.items()}
        ends = full.ids["positions"].clone()
        for span in full.spans:
            document = ends[span.sequence, span.start : span.start + span.length, T]
            document.fill_(document.max())
        visual = _on_device(ids["image_ids"] != NO_IMAGE, batch)
        return TokenIndices(ids | {"positions": self.column(ends)}, {"visual": visual})

    def _visual_runs(self, visual: Tensor) -> list[tuple[int, int]]:
        """For each sequence its visual tokens in this slice, as a range of numbers: the visual tokens [B, L] of a batch
        are numbered in their order, sequence by sequence."""
        before = visual.flatten().cumsum(0).view_as(visual) - visual.long()
        first = before[:, self.start]
        last = first + self.column(visual).sum(1)
        return list(zip(first.tolist(), last.tolist(), strict=True))


def _on_device(chosen: Tensor, batch: Batch) -> Index:
    return Index.of(chosen).map(lambda x: sent(x, batch.token_ids.device))


def check_length(length: int, size: int) -> None:
    """Refuses sequences that cannot be cut into equal slices.

    Raises:
        ValueError: if their length is no multiple of ``size``.
    """
    if length % size:
        raise ValueError(
            f"stage.context_parallel: packed sequences of {length} tokens cannot be cut into {size} equal slices; "
            f"choose data.seq_len as a multiple of {size}, for example {-(-length // size) * size}"
        )
