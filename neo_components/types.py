"""The types that pass between the parts of the library, and the legend of shape letters.

Shape letters, used in names, comments and docstrings everywhere::

    B rows          L tokens per row    D hidden width      N query heads   K key/value heads
    E head width    V vocabulary        P patches           I images        C image channels

A :class:`Sample` is what a user has, a :class:`Batch` is all that a model needs. Nothing but a ``Batch`` passes from
``neo_components.data`` to the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that is not learnt (PyTorch's ``ignore_index``)."""

NO_IMAGE = -1
"""``Batch.image_ids`` of a token that is no visual token."""

PADDING = -1
"""``Batch.document_ids`` of a token that only fills its row."""

IndexRule = Callable[[Tensor, "list[tuple[int, int]]"], Tensor]
"""``rule(image_ids [L], grids) -> positions [L, 3]`` of one document; ``grids``: (rows, columns) of each image."""


@dataclass(frozen=True)
class InputSpec:
    """What the input of one model looks like; obtained from ``model.input_spec`` and handed to ``pack``.

    Args:
        image_token_id: id that stands for one visual token.
        image_start_id: id of the token before an image, ``<img>``.
        image_end_id: id of the token after an image, ``</img>``.
        vocab_size: rows of the word embedding, V. Ids of the three image tokens may lie beyond it.
        patch_size: side of a patch in pixels.
        fold: patches per side of a visual token; a visual token covers ``patch_size * fold`` pixels a side.
        channels: image channels, C.
        index_rule: gives each token its T, H and W position (``components/rotary.py``).
    """

    image_token_id: int
    image_start_id: int
    image_end_id: int
    vocab_size: int
    patch_size: int
    fold: int
    channels: int
    index_rule: IndexRule

    @property
    def factor(self) -> int:
        """Sides of an image are multiples of this many pixels."""
        return self.patch_size * self.fold

    @property
    def image_special_token_ids(self) -> tuple[int, int, int]:
        """The three ids that may lie beyond the vocabulary."""
        return self.image_token_id, self.image_start_id, self.image_end_id


@dataclass
class Sample:
    """One document: token ids, what is learnt of them, and its images.

    Args:
        token_ids: [L] int64; each image is a run of ``image_token_id``, one per visual token.
        labels: [L] int64, unshifted, ``-100`` where nothing is learnt; ``None`` for inference.
        images: tensors [C, H, W] float, normalised, sides a multiple of ``InputSpec.factor``; in order of appearance.
            Raw pixels, uint8 of 0 to 255, are normalised as ``load_image`` does when they are packed.
        key: name of the sample in its source, used in messages.
        source: name of its source, by which the training loss is told apart.
    """

    token_ids: Tensor
    labels: Tensor | None = None
    images: Sequence[Tensor] = ()
    key: str = ""
    source: str = ""


@dataclass
class Batch:
    """B packed rows of L tokens: everything that a model needs.

    Args:
        token_ids: [B, L] int64.
        positions: [B, L, 3] int64 or float; T, H and W position of each token.
        document_ids: [B, L] int64; number of the document in its row, ``-1`` for padding.
        image_ids: [B, L] int64; number of the image in its row, ``-1`` for all but visual tokens.
        labels: [B, L] int64, unshifted, ``-100`` ignored; a document's first token is never learnt.
        loss_weights: [B, L] float32, 0 where the label is ignored.
        patches: [P, C * patch_size**2] float32; the patches of all images in order of their visual tokens, the
            ``fold**2`` patches of one visual token next to each other; each row is (channel, y, x).
        patch_positions: [P, 2] int64; row and column of each patch in its image's grid of patches.
        keys: names of the samples of each row, in the order of their documents.
        sources: names of their sources.
        image_counts: how many images each of them has.
    """

    token_ids: Tensor
    positions: Tensor
    document_ids: Tensor
    image_ids: Tensor
    labels: Tensor
    loss_weights: Tensor
    patches: Tensor
    patch_positions: Tensor
    keys: list[list[str]] = field(default_factory=list)
    sources: list[list[str]] = field(default_factory=list)
    image_counts: list[list[int]] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory; the hook that torch's DataLoader calls."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _columns()}
        return replace(self, **changed)

    @staticmethod
    def stack(rows: Sequence[Batch]) -> Batch:
        """Joins batches of equal row length into one with all their rows.

        Raises:
            ValueError: if the row lengths differ.
        """
        if len(rows) == 1:  # nothing to copy: patches are large
            return rows[0]
        lengths = {row.token_ids.shape[1] for row in rows}
        if len(lengths) != 1:
            raise ValueError(f"rows of one batch must be equally long, got lengths {sorted(lengths)}; set seq_len")
        joined: dict[str, Any] = {name: torch.cat([getattr(row, name) for row in rows]) for name in _columns()}
        joined |= {name: [told for row in rows for told in getattr(row, name)] for name in TOLD}
        return Batch(**joined)


TOLD = ("keys", "sources", "image_counts")
"""What a batch tells of its samples in lists; all else in it is tensors."""


def _columns() -> list[str]:
    return [f.name for f in fields(Batch) if f.name not in TOLD]


@dataclass
class Output:
    """What a model returns.

    Args:
        logits: [B, L, V].
        loss: scalar, or ``None`` if the batch has no label.
        hidden_states: what each step produced, by name, if asked for.
    """

    logits: Tensor
    loss: Tensor | None = None
    hidden_states: dict[str, Tensor] | None = None
