"""Rotary position embedding: one implementation, every variant as data.

A variant is an index rule (which T, H and W position a token has) and a table (which axis and which frequency each
pair of channels rotates by). The channels of a query or key head form three sections, T (E channels, as in the
language model), H and W (E/2 channels each). Inside a section pair k joins channels k and k + width/2 ("rotate half").
The variants are in ``ropes/``.

Source: NEO paper equation 2; Su et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neo_components.components.rope_scaling import check_scaling, frequencies, length_bucket_of, magnitude
from neo_components.errors import ArgumentError
from neo_components.registry import ROPES, Choice
from neo_components.token_indices import TokenIndices, sent
from neo_components.types import DocumentTokens

T, H, W = 0, 1, 2
"""The axes."""


@dataclass(frozen=True)
class PairTable:
    """Which axis (0 T, 1 H, 2 W) and which frequency (radians per position) each pair of channels rotates by.

    Args:
        axis: one entry per pair; the T section's E/2 pairs first, then E/4 of H and E/4 of W.
        frequency: same length.
    """

    axis: tuple[int, ...]
    frequency: tuple[float, ...]

    def __add__(self, other: PairTable) -> PairTable:
        return PairTable(self.axis + other.axis, self.frequency + other.frequency)


def pairs(axis: int, frequency: Sequence[float]) -> PairTable:
    """The pairs of one section, all on one axis."""
    return PairTable((axis,) * len(frequency), tuple(frequency))


def section(axis: int, width: int, base: float) -> PairTable:
    """The pairs of one section of ``width`` channels: frequencies ``base ** (-2k / width)``, all on one axis."""
    return pairs(axis, frequencies(None, width, base).tolist())


class RopeVariant:
    """Base of the variants that are registered in ``ROPES``; its constructor's parameters are its options.

    ``base_h`` and ``base_w`` are those of the block where a variant takes them. See ``ropes/native.py``.
    """

    def positions(self, document: DocumentTokens) -> Tensor:
        """[L, 3] int64 or float: T, H and W position of each token. Text behind the document's end counts on from it,
        so that generation gets the positions of new tokens."""
        raise NotImplementedError

    def table(self, frequency_t: Sequence[float]) -> PairTable:
        """The E pairs of all three sections.

        Args:
            frequency_t: the language model's own frequencies, one for each of the E/2 pairs of the T section.
        """
        raise NotImplementedError


class Rotary(nn.Module):
    """Makes the cosines and sines of all pairs from positions, once per batch.

    Args:
        rope: registered name of the variant, or a mapping of ``kind`` and its options.
        head_width: E, a multiple of 4.
        base_t: base of the T frequencies.
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
        rope_scaling: how the T frequencies are stretched (``rope_scaling.py``); ``None``: not at all.
        rotary_width: how many of the T channels rotate, the first ones; ``None``: all. The others keep frequency 0.

    Attributes:
        variant: the RoPE variant, of ``ROPES``.

    Raises:
        ValueError: if the variant or the scaling is unknown, a width is not possible, or the variant's table does not
            have E pairs.
    """

    axis: Tensor
    frequency: Tensor

    def __init__(
        self,
        rope: Choice,
        head_width: int,
        base_t: float,
        base_h: float,
        base_w: float,
        rope_scaling: Mapping[str, Any] | None = None,
        rotary_width: int | None = None,
    ) -> None:
        super().__init__()
        if head_width % 4:
            raise ArgumentError(
                "head_width",
                f"must be a multiple of 4 to split into T, H and W pairs, got {head_width}: give another, or take "
                "another language model, as one with such heads cannot be widened, so nothing can be attached to it",
            )
        rotated = head_width if rotary_width is None else rotary_width
        if rotated % 2 or not 0 <= rotated <= head_width:
            raise ArgumentError(
                "rotary_width", f"must be even and lie in 0 to head_width ({head_width}), got {rotated}"
            )
        self.variant: RopeVariant = ROPES.make(rope, base_h=base_h, base_w=base_w)
        self._rope, self._width, self._rotated, self._base_t = rope, head_width, rotated, base_t
        self.scaling = rope_scaling if rotated else None
        if self.scaling is not None:
            check_scaling(self.scaling, rotated)
        self._tables: dict[int, PairTable] = {}
        self._magnitude = magnitude(self.scaling)
        self.register_buffer("axis", torch.tensor(self.table(0).axis, device="cpu"), persistent=False)
        self.register_buffer("frequency", self._frequency(0), persistent=False)

    def table(self, length_bucket: int) -> PairTable:
        """The pairs of documents of one rope length bucket (``rope_scaling.length_bucket_of``)."""
        if length_bucket not in self._tables:
            rotated = frequencies(self.scaling, self._rotated, self._base_t, length_bucket).tolist()
            still = [0.0] * ((self._width - self._rotated) // 2)
            table = self.variant.table([*rotated, *still])
            if len(table.axis) != self._width or len(table.frequency) != self._width:
                raise ArgumentError(
                    "rope",
                    f"{self._rope!r} gives {len(table.axis)} axes and {len(table.frequency)} frequencies, not one each "
                    f"for the {self._width} pairs of a head",
                )
            self._tables[length_bucket] = table
        return self._tables[length_bucket]

    def _frequency(self, length_bucket: int) -> Tensor:
        return torch.tensor(self.table(length_bucket).frequency, dtype=torch.float32, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Moves with the model to another device, but not to another type: rounded frequencies rotate far positions
        by wrong angles. They are recomputed rather than moved, so that a model can also come from the meta device."""
        super()._apply(fn, recurse)
        device = self.frequency.device
        if device.type != "meta":
            self.axis, self.frequency = torch.tensor(self.table(0).axis, device=device), self._frequency(0).to(device)
        return self

    @torch.no_grad()
    def fill_tables(self) -> None:
        """Fills axes and frequencies in place: after a move from the meta device they hold nothing."""
        self.axis.copy_(torch.tensor(self.table(0).axis))
        self.frequency.copy_(self._frequency(0))

    def length_bucket(self, length: int) -> int:
        """Which set of frequencies a document of ``length`` T positions gets; see ``rope_scaling.length_bucket_of``."""
        return length_bucket_of(self.scaling, length)

    @property
    def looks_at_length(self) -> bool:
        """Whether a document's length selects its frequencies."""
        return self.scaling is not None and self.scaling["rope_type"] in ("longrope", "dynamic")

    def forward(
        self, positions: Tensor, document_ids: Tensor | None = None, known: TokenIndices | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines.

        Args:
            positions: [B, L, 3].
            document_ids: [B, L]; ``None``: each sequence is one document. Only read where a document's length
                selects its frequencies.
            known: what the CPU knows of the tokens, so that a device is not asked for these lengths.

        Returns:
            [B, L, 1, E] float32 each: one entry per pair, for any head.
        """
        frequency = self._by_document(positions, document_ids, known) if self.looks_at_length else self.frequency
        # Half precision would merge neighboring positions, so the angle is float32 whatever the model's type.
        angle = positions[..., self.axis].float() * frequency
        cosines, sines = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
        if self._magnitude == 1.0:
            return cosines, sines
        scale = torch.ones_like(self.frequency)
        scale[: self._rotated // 2].fill_(self._magnitude)
        return cosines * scale, sines * scale

    def _by_document(self, positions: Tensor, document_ids: Tensor | None, known: TokenIndices | None) -> Tensor:
        """[B, L, E]: each token's frequencies, by its own document's length alone, whatever else is packed with it."""
        if known is not None:
            positions, document_ids = known.ids["positions"], known.ids["document_ids"]
        at = positions[..., T].numpy(force=True)
        numbers = np.zeros(at.shape, dtype=np.int64) if document_ids is None else document_ids.numpy(force=True)
        begins = np.diff(numbers, prepend=numbers[:, :1] - 1).astype(bool).flatten()
        ends = np.maximum.reduceat(at.flatten(), np.flatnonzero(begins)) + 1
        length_buckets = [self.length_bucket(math.ceil(end)) for end in ends.tolist()]
        kinds = sorted(set(length_buckets))
        device = self.frequency.device
        table = sent(torch.stack([self._frequency(kind) for kind in kinds]), device)
        if len(kinds) == 1:
            return table[0]
        index = np.array([kinds.index(bucket) for bucket in length_buckets])[begins.cumsum() - 1]
        return table[sent(torch.from_numpy(index.reshape(at.shape)), device)]


ROPE = ("rope", "head_width", "base_t", "base_h", "base_w", "rope_scaling", "rotary_width")
"""Arguments of a block that its rotary table is made from, in the order of :class:`Rotary`."""


def rotary_of(arguments: Mapping[str, Any]) -> Rotary:
    """The rotary table of a block with these arguments."""
    return Rotary(*(arguments[name] for name in ROPE))


def rotate(parts: Sequence[Tensor], cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotates the sections of a query or key together (NEO paper equation 2).

    Args:
        parts: T, H and W sections, [B, L, heads, width of the section] each; a T section of which only the first
            channels rotate comes as two.
        cosines: [B, L, 1, E], from :class:`Rotary`.
        sines: same shape.

    Returns:
        [B, L, heads, 2E], the first halves of all sections before the second halves. Queries and keys are ordered
        alike, so their products are those of the order T, H, W.
    """
    halves = [part.chunk(2, dim=-1) for part in parts]
    first, second = (torch.cat(half, dim=-1) for half in zip(*halves, strict=True))
    if not torch.compiler.is_compiling():
        return _Rotate.apply(first, second, cosines, sines)
    rotated = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return rotated.to(parts[0].dtype)


class _Rotate(torch.autograd.Function):
    """Half as many passes over memory as torch's autograd takes; the gradient rotates back by the same tables."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        rotated = _rotated(first.to(cosines.dtype), second.to(cosines.dtype), cosines, sines)
        return rotated.to(first.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        first, second = grad.to(cosines.dtype).chunk(2, dim=-1)
        rotated = _rotated(first, second, cosines, -sines)
        first, second = rotated.to(grad.dtype).chunk(2, dim=-1)
        return first, second, None, None


def _rotated(first: Tensor, second: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[B, L, heads, E] twice -> [B, L, heads, 2E], all of one type."""
    out = first.new_empty(*first.shape[:-1], 2 * first.shape[-1])
    one, two = out.chunk(2, dim=-1)
    torch.mul(first, cosines, out=one)
    one.addcmul_(second, sines, value=-1.0)
    torch.mul(second, cosines, out=two)
    two.addcmul_(first, sines)
    return out
