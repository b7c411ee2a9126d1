"""What each token of a padded batch is: its document, its image and its position; it grows with a cache.

transformers hands over rows [B, L] with padding and counts one position per token. Here every row is one document, and
the positions come from the model's own index rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neo_components.data.packing import lay_out
from neo_components.types import NO_IMAGE, PADDING, DocumentTokens, ImageGrid, InputSpec, TokenKind

AHEAD = 128
"""Positions of text that are computed ahead, so that the rule does not run for every new token."""


@dataclass
class Rows:
    """The S tokens that are known so far.

    Args:
        spec: of the model.
        document_ids: [B, S] int64, 0 or ``-1`` for padding.
        image_ids: [B, S] int64, counted in each row.
        token_kinds: [B, S] int64.
        grids: (rows, columns) of visual tokens of each image of each row.
    """

    spec: InputSpec
    document_ids: Tensor
    image_ids: Tensor
    token_kinds: Tensor
    grids: list[list[tuple[int, int]]]
    _known: Tensor | None = field(default=None, repr=False)

    @staticmethod
    def none(spec: InputSpec, count: int) -> Rows:
        """``count`` rows without a token yet."""
        empty = torch.zeros(count, 0, dtype=torch.int64, device="cpu")
        return Rows(spec, empty, empty, empty, [[] for _ in range(count)])

    def cut(self, length: int) -> Rows:
        """Only the first tokens: a cache may have been cropped."""
        if length > self.image_ids.shape[1]:
            raise ValueError(f"the cache holds {length} tokens, of which this model read {self.image_ids.shape[1]}")
        if length == self.image_ids.shape[1]:
            return self
        images = self.image_ids[:, :length]
        left = [grids[: int(row.max()) + 1] for grids, row in zip(self.grids, images, strict=True)] if length else []
        kinds = self.token_kinds[:, :length]
        return Rows(self.spec, self.document_ids[:, :length], images, kinds, left or [[] for _ in self.grids])

    def extend(self, token_ids: Tensor, attention_mask: Tensor | None, sizes: Sequence[tuple[int, int]]) -> Rows:
        """The rows with further tokens.

        Args:
            token_ids: [B, L] int64.
            attention_mask: [B, S + L], 0 for padding, of all tokens including those known; ``None``: no new padding.
            sizes: (rows, columns) of visual tokens of the new images, row by row.

        Raises:
            ValueError: if mask or images do not fit the tokens, or an id is out of range.
        """
        count, length = token_ids.shape
        known = self.image_ids.shape[1]
        if count != len(self.grids):
            raise ValueError(f"the cache holds {len(self.grids)} rows, the new tokens are of {count}")
        document_ids = self._documents(token_ids, attention_mask)
        decoding = known > 0 and length == 1 and not sizes
        # A single new token is text, as in NEO.generate; to look at it would wait for the device.
        if decoding:
            new, kinds = torch.full_like(token_ids, NO_IMAGE), torch.full_like(token_ids, TokenKind.TEXT)
            grids = self.grids
        else:
            new, kinds, grids = self._images(token_ids, document_ids[:, known:], sizes)
        image_ids = torch.cat([self.image_ids.to(new.device), new], dim=1)
        kinds = torch.cat([self.token_kinds.to(kinds.device), kinds], dim=1)
        rows = Rows(self.spec, document_ids, image_ids, kinds, grids)
        rows._known = self._known if decoding else None
        return rows

    def _documents(self, token_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, S + L] document ids."""
        total = (token_ids.shape[0], self.document_ids.shape[1] + token_ids.shape[1])
        if attention_mask is None:
            before = self.document_ids.to(token_ids.device)
            return torch.cat([before, torch.zeros_like(token_ids)], dim=1)
        if attention_mask.shape != total:
            raise ValueError(
                f"attention_mask must be {list(total)}, one value for each token in the cache and in input_ids, "
                f"got {list(attention_mask.shape)}"
            )
        return torch.where(attention_mask.to(token_ids.device).bool(), 0, PADDING)

    def _images(
        self, token_ids: Tensor, document_ids: Tensor, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, list[list[tuple[int, int]]]]:
        """Image ids and kinds of the new tokens, and all grids with those of the new images."""
        ids, real = token_ids.cpu(), document_ids.cpu() != PADDING
        self._check_ids(ids[real])
        image_ids, kinds = torch.full_like(ids, NO_IMAGE), torch.full_like(ids, TokenKind.TEXT)
        grids, left = [], list(sizes)
        for row, before in enumerate(self.grids):
            wanted = int((ids[row][real[row]] == self.spec.image_token_id).sum())
            own: list[tuple[int, int]] = []
            while left and sum(len(self.spec.image_layout(*size)) for size in own) < wanted:
                own.append(left.pop(0))
            if row + 1 == len(self.grids):
                own += left  # too many images: the count below says so
            document = lay_out(ids[row][real[row]], [ImageGrid(*size) for size in own], self.spec, f"row {row}")
            numbers = document.image_ids
            image_ids[row, real[row]] = torch.where(numbers == NO_IMAGE, NO_IMAGE, numbers + len(before))
            kinds[row, real[row]] = document.kinds
            grids.append([*before, *own])
        return image_ids.to(token_ids.device), kinds.to(token_ids.device), grids

    def _check_ids(self, ids: Tensor) -> None:
        known = (ids >= 0) & (ids < self.spec.vocab_size) | torch.isin(
            ids, ids.new_tensor(self.spec.image_special_token_ids)
        )
        if not known.all():
            raise ValueError(
                f"token id {int(ids[~known][0])} is out of range; the vocabulary has {self.spec.vocab_size} tokens and "
                f"the image tokens are {self.spec.image_special_token_ids}"
            )

    def positions(self, count: int) -> Tensor:
        """[B, count, 3]: T, H and W of the last ``count`` tokens; 0 for padding."""
        total = self.image_ids.shape[1]
        if self._known is None or self._known.shape[1] < total:
            self._known = self._all_positions(AHEAD).to(self.image_ids.device)
        return self._known[:, total - count : total]

    def lengths(self) -> list[int]:
        """T positions of each row, by which some language models choose their frequencies."""
        total = self.image_ids.shape[1]
        if not total:
            return [0] * len(self.grids)
        return [math.ceil(last) + 1 for last in self.positions(total)[..., 0].amax(1).tolist()]

    def _all_positions(self, ahead: int) -> Tensor:
        """[B, S + ahead, 3], as if text followed."""
        images, kinds = self.image_ids.cpu(), self.token_kinds.cpu()
        real = self.document_ids.cpu() != PADDING
        none, text = images.new_full((ahead,), NO_IMAGE), kinds.new_full((ahead,), TokenKind.TEXT)
        found = []
        for row, grids in enumerate(self.grids):
            longer = DocumentTokens(
                torch.cat([images[row][real[row]], none]),
                torch.cat([kinds[row][real[row]], text]),
                [ImageGrid(*size) for size in grids],
            )
            positions = self.spec.index_rule(longer)
            row_positions = positions.new_zeros(images.shape[1] + ahead, 3)
            row_positions[torch.cat([real[row], real.new_ones(ahead)])] = positions
            found.append(row_positions)
        return torch.stack(found)
