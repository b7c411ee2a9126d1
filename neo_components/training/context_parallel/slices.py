"""The slice of a batch that one of several processes holds: some tokens of every packed sequence, and their patches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neo_components.types import NO_IMAGE, Batch

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

    def shifted(self, x: Tensor, filling: float) -> Tensor:
        """[B, L] -> [B, l]: the entry of the token behind each, which may lie in the next slice; behind the sequence's
        last token, ``filling``."""
        following = torch.cat([x[:, 1:], x.new_full((len(x), 1), filling)], dim=1)
        return self.column(following)

    def batch(self, batch: Batch, fold: int) -> Batch:
        """The part of a batch that this slice holds.

        Args:
            batch: the full one.
            fold: patches per side of a visual token.

        Returns:
            [B, l] and [p, ...] of the patches of its visual tokens, also where an image lies in several slices. What a
            batch knows of whole images and samples (``image_grids``, ``keys`` ...) is that of the full batch.
        """
        runs = self.visual_runs(batch.image_ids)
        patches, positions = (
            torch.cat([x[first * fold**2 : last * fold**2] for first, last in runs])
            for x in (batch.patches, batch.patch_positions)
        )
        columns: dict[str, Any] = {name: self.column(getattr(batch, name)) for name in PER_TOKEN}
        return replace(batch, **columns, patches=patches, patch_positions=positions)

    def visual_runs(self, image_ids: Tensor) -> list[tuple[int, int]]:
        """For each sequence the visual tokens in this slice, as a range of numbers: those of a batch [B, L] are
        numbered in their order, sequence by sequence."""
        visual = (image_ids != NO_IMAGE).cpu()
        before = visual.flatten().cumsum(0).view_as(visual) - visual.long()
        first = before[:, self.start]
        last = first + self.column(visual).sum(1)
        return list(zip(first.tolist(), last.tolist(), strict=True))


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
