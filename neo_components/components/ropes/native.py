"""Native-RoPE: text counts on T alone, the tokens of an image share a T and count their rows and columns on H and W.

Source: NEO paper equation 2 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neo_components.components.rotary import H, PairTable, RopeVariant, T, W, pairs, section
from neo_components.registry import ROPES
from neo_components.types import NO_IMAGE, DocumentTokens


@ROPES.register("native")
@dataclass(frozen=True)
class Native(RopeVariant):
    """T rotates the language model's channels, H and W rotate their own new channels with their own bases.

    Args:
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
    """

    base_h: float = 1e4
    base_w: float = 1e4

    def positions(self, document: DocumentTokens) -> Tensor:
        """[L, 3] int64: text (t, 0, 0); all tokens of an image share the next t. A frame of a video is an image."""
        device = document.image_ids.device
        positions = torch.zeros(len(document.image_ids), 3, dtype=torch.int64, device=device)
        positions[:, T] = _steps(document.image_ids).cumsum(0) - 1
        for number, image in enumerate(document.images):
            inside = document.of_image(number)
            positions[inside, H] = torch.arange(image.rows, device=device).repeat_interleave(image.columns)
            positions[inside, W] = torch.arange(image.columns, device=device).repeat(image.rows)
        return positions

    def table(self, frequency_t: Sequence[float]) -> PairTable:
        """T: the language model's own pairs; H and W: half as many each, from fast to slow."""
        half = len(frequency_t)
        return pairs(T, frequency_t) + section(H, half, self.base_h) + section(W, half, self.base_w)


def _steps(image_ids: Tensor) -> Tensor:
    """1 where T advances: at every token outside of images and at the first token of each image."""
    previous = torch.cat([image_ids.new_full((1,), NO_IMAGE), image_ids[:-1]])
    return ((image_ids == NO_IMAGE) | (image_ids != previous)).long()
