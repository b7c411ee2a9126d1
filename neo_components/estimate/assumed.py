"""Packed sequences of assumed documents, to estimate what a step costs before there is data."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from neo_components.model.neo import NEO
from neo_components.types import IGNORED, NO_IMAGE, Batch, InputSpec, TokenKind


@dataclass(frozen=True)
class Document:
    """What every document of a sequence is taken to be: one image between its two boundary tokens, then text.

    Args:
        visual: visual tokens of its image; 0: no image. Tokens that a patch embedding adds to them come on top.
        text: other tokens, without the two around the image.
        targets: fraction of the text that are targets, the last tokens.
    """

    visual: int
    text: int
    targets: float = 0.5

    @classmethod
    def of_length(cls, longest: int, spec: InputSpec, text: int = 0, visual: int | None = None) -> Document:
        """The document of at most ``longest`` tokens with the most visual tokens, but no more than ``visual``."""
        visual = max(longest - text - 2, 0) if visual is None else min(visual, max(longest - text - 2, 0))
        while visual and cls(visual, text).length(spec) > longest:
            visual -= 1
        return cls(visual, text)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its image, as near to a square as their product allows."""
        rows = next((n for n in range(isqrt(self.visual), 0, -1) if self.visual % n == 0), 0)
        return rows, self.visual // max(rows, 1)

    def image(self, spec: InputSpec) -> list[int]:
        """Kinds of the tokens of its image, without the two around it."""
        return spec.image_layout(*self.grid).tolist() if self.visual else []

    def length(self, spec: InputSpec) -> int:
        """Tokens of the document."""
        return len(self.image(spec)) + 2 * bool(self.visual) + self.text


def assumed_batch(model: NEO, document: Document, count: int, seq_len: int) -> Batch:
    """Packed sequences full of equal documents, the last one of each cut to text of what is left.

    Args:
        model: whose patches they are; on any device.
        document: what each document is.
        count: B.
        seq_len: L.

    Returns:
        A batch whose patches lie on the meta device: shapes without values.

    Raises:
        ValueError: if a document is longer than a sequence or empty.
    """
    spec, frame = model.input_spec, bool(document.visual)
    image, length = document.image(spec), document.length(spec)
    if not 1 <= length <= seq_len:
        added = f" (and {len(image) - document.visual} that are added to them)" if len(image) > document.visual else ""
        raise ValueError(
            f"a document of {document.visual} visual{added} and {document.text} other tokens does not fit a packed "
            f"sequence of {seq_len}; give fewer, or a longer data.seq_len"
        )
    documents, left = divmod(seq_len, length)
    targets = round(document.targets * document.text)
    one: dict[str, list[Any]] = {
        "token_ids": [spec.image_start_id] * frame + [spec.image_token_id] * len(image)
        + [spec.image_end_id] * frame + [0] * document.text,
        "image_ids": [NO_IMAGE] * frame + [0] * len(image) + [NO_IMAGE] * (frame + document.text),
        "token_kinds": [TokenKind.BOUNDARY] * frame + image
        + [TokenKind.BOUNDARY] * frame + [TokenKind.TEXT] * document.text,
        "labels": [IGNORED] * (length - targets) + [0] * targets,
    }  # fmt: skip
    rest = {"token_ids": 0, "image_ids": NO_IMAGE, "token_kinds": TokenKind.TEXT, "labels": IGNORED}
    columns: dict[str, Any] = {
        name: torch.tensor([*(values * documents), *([rest[name]] * left)])[None].repeat(count, 1)
        for name, values in one.items()
    }
    number = torch.arange(documents).repeat_interleave(length)
    number = torch.cat([number, torch.full((left,), documents)])[None].repeat(count, 1)
    columns["image_ids"] = torch.where(columns["image_ids"] == NO_IMAGE, NO_IMAGE, number)
    images = count * documents if frame else 0
    patches = images * document.visual * spec.fold**2
    return Batch(
        **columns,
        positions=torch.zeros(count, seq_len, 3, dtype=torch.int64),
        document_ids=number,
        loss_weights=(columns["labels"] != IGNORED).float(),
        patches=torch.empty(patches, spec.channels * spec.patch_size**2, device="meta"),
        patch_positions=torch.empty(patches, 2, dtype=torch.int64, device="meta"),
        image_grids=torch.tensor([document.grid] * images, dtype=torch.int64).view(-1, 2) * spec.fold,
        keys=[[] for _ in range(count)],
    )
