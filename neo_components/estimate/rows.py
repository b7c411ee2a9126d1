"""Rows of assumed documents, to tell what a step costs before there is data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from neo_components.model.neo import NEO
from neo_components.types import IGNORED, NO_IMAGE, Batch


@dataclass(frozen=True)
class Document:
    """What every document of a row is taken to be: one image between its two boundary tokens, then text.

    Args:
        visual: visual tokens of its image; 0: no image.
        text: other tokens, without the two around the image.
        learnt: share of the text that has a label, the last tokens.
    """

    visual: int
    text: int
    learnt: float = 0.5

    @property
    def length(self) -> int:
        """Tokens of the document."""
        return self.visual + 2 * bool(self.visual) + self.text


def assumed_rows(model: NEO, document: Document, rows: int, seq_len: int) -> Batch:
    """Rows full of equal documents, the last one of each row cut to text of what is left.

    Args:
        model: whose patches they are; on any device.
        document: what each document is.
        rows: B.
        seq_len: L.

    Returns:
        A batch whose patches lie on the meta device: shapes without values.

    Raises:
        ValueError: if a document is longer than a row or empty.
    """
    if not 1 <= document.length <= seq_len:
        raise ValueError(
            f"a document of {document.visual} visual and {document.text} other tokens does not fit a row of "
            f"{seq_len}; give fewer, or a longer data.seq_len"
        )
    count, left = divmod(seq_len, document.length)
    frame = bool(document.visual)
    learnt = round(document.learnt * document.text)
    image = [NO_IMAGE] * frame + [0] * document.visual + [NO_IMAGE] * (frame + document.text)
    label = [IGNORED] * (document.length - learnt) + [0] * learnt
    image_ids = torch.tensor(image).repeat(count, 1)
    image_ids = torch.where(image_ids == NO_IMAGE, NO_IMAGE, torch.arange(count)[:, None])
    documents = torch.arange(count).repeat_interleave(document.length)
    documents = torch.cat([documents, torch.full((left,), count)])[None].repeat(rows, 1)
    images = torch.cat([image_ids.flatten(), torch.full((left,), NO_IMAGE)])[None].repeat(rows, 1)
    last = torch.full((left,), IGNORED)
    labels = torch.cat([torch.tensor(label).repeat(count), last])[None].repeat(rows, 1)
    spec = model.input_spec
    patches = rows * count * document.visual * spec.fold**2
    ids = torch.where(images == NO_IMAGE, 0, spec.image_token_id)
    starts = torch.cat([images[:, 1:], torch.full((rows, 1), NO_IMAGE)], dim=1)
    ends = torch.cat([torch.full((rows, 1), NO_IMAGE), images[:, :-1]], dim=1)
    words = images == NO_IMAGE
    ids = torch.where(words & (starts != NO_IMAGE), spec.image_start_id, ids)
    ids = torch.where(words & (ends != NO_IMAGE), spec.image_end_id, ids)
    return Batch(
        token_ids=ids,
        positions=torch.zeros(rows, seq_len, 3, dtype=torch.int64),
        document_ids=documents,
        image_ids=images,
        labels=labels,
        loss_weights=(labels != IGNORED).float(),
        patches=torch.empty(patches, spec.channels * spec.patch_size**2, device="meta"),
        patch_positions=torch.empty(patches, 2, dtype=torch.int64, device="meta"),
        keys=[[] for _ in range(rows)],
    )
