"""Plain 1D RoPE: every token, visual or not, is one step after the token before it (InternVL3 as compared in NEO)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neo_components.components.rotary import PairTable, RopeVariant, pairs
from neo_components.registry import ROPES
from neo_components.types import DocumentTokens


@ROPES.register("1d")
@dataclass(frozen=True)
class OneDimensional(RopeVariant):
    """The language model's own positions; its table is repeated over the new channels (``mirror``)."""

    def positions(self, document: DocumentTokens) -> Tensor:
        """[L, 3] int64: (p, p, p)."""
        device = document.image_ids.device
        return torch.arange(len(document.image_ids), device=device)[:, None].expand(-1, 3).clone()

    def table(self, frequency_t: Sequence[float]) -> PairTable:
        """The language model's pairs, twice."""
        own = pairs(0, frequency_t)
        return own + own
