"""Inputs of a block beside the hidden states; blocks with the same rotary table and mask rule share them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from neo_components.token_indices import TokenIndices
from neo_components.types import NO_IMAGE


class Attend(Protocol):
    """An attention backend prepared for one batch."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, L, N, 2E], k [B, L, K, 2E], v [B, L, K, E], scale of the scores -> [B, L, N, E]."""


@dataclass(frozen=True)
class BlockInputs:
    """What :class:`~neo_components.components.primitive.NativePrimitive` reads beside x.

    Args:
        rotary: cosines and sines, [B, L, 1, E] each, from :class:`~neo_components.components.rotary.Rotary`.
        attend: attention backend of this batch, or one layer of a cache.
        image_ids: [B, L] int64; number of the image that a token belongs to, ``-1`` for words and boundary tokens.
        token_kinds: [B, L] int64, of :class:`~neo_components.types.TokenKind`.
        known: what the CPU knows of the tokens; ``None``: nothing.
    """

    rotary: tuple[Tensor, Tensor]
    attend: Attend
    image_ids: Tensor
    token_kinds: Tensor
    known: TokenIndices | None = None

    @property
    def visual(self) -> Tensor:
        """[B, L] bool: whether the patch embedding made a token."""
        return self.image_ids != NO_IMAGE

    @property
    def on_cpu(self) -> BlockInputs:
        """The same with ``image_ids`` and ``token_kinds`` on the CPU, if it knows them: what is chosen by them is known
        without asking a device."""
        if self.known is None:
            return self
        ids = self.known.ids
        return replace(self, image_ids=ids["image_ids"], token_kinds=ids["token_kinds"])
