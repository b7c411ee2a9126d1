"""Rotary position embedding: one implementation, every variant as data.

A variant is an index rule (which T, H and W position a token has) and a table (which axis and which frequency each
pair of channels turns with). The channels of a query or key head lie in three sections, T (E channels, as in the
language model), H and W (E/2 channels each). Inside a section pair k joins channels k and k + width/2 ("rotate half").

Source: NEO paper equation 2; Su et al. 2021.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neo_components.components.rope_scaling import check_scaling, frequencies, length_bucket_of, magnitude
from neo_components.types import NO_IMAGE, IndexRule

T, H, W = 0, 1, 2


@dataclass(frozen=True)
class PairTable:
    """Which axis (0 T, 1 H, 2 W) and which frequency (radians per position) each pair of channels turns with.

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


@dataclass(frozen=True)
class RopeVariant:
    """A named variant.

    Args:
        index_rule: positions of a document's tokens.
        table: ``table(frequency_t, base_h, base_w)`` -> the E pairs of all three sections. ``frequency_t`` holds the
            language model's own frequencies, one for each of the E/2 pairs of the T section.
    """

    index_rule: IndexRule
    table: Callable[[Sequence[float], float, float], PairTable]


ROPE_VARIANTS: dict[str, RopeVariant] = {}


def register_rope(name: str) -> Callable[[Callable[[], RopeVariant]], Callable[[], RopeVariant]]:
    """Decorator that enters a variant under the short name that recipes use (``rope: {kind: name}``)."""

    def enter(build: Callable[[], RopeVariant]) -> Callable[[], RopeVariant]:
        ROPE_VARIANTS[name] = build()
        return build

    return enter


def rope_variant(name: str) -> RopeVariant:
    """The variant of that name.

    Raises:
        ValueError: if no variant has that name.
    """
    if name not in ROPE_VARIANTS:
        raise ValueError(
            f"rope {name!r} is unknown; registered: {', '.join(sorted(ROPE_VARIANTS))}; if it is your own, import the "
            "module that registers it (neo ... --import MODULE)"
        )
    return ROPE_VARIANTS[name]


def native_positions(image_ids: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Native positions: text (t, 0, 0); all tokens of an image share the next t and count rows and columns.

    Args:
        image_ids: [L] number of the image of each visual token in this document, ``-1`` for all others.
        grids: (rows, columns) of visual tokens of each image.

    Returns:
        [L, 3] int64. Source: NEO paper figure 3.
    """
    positions = torch.zeros(image_ids.shape[0], 3, dtype=torch.int64)
    positions[:, T] = _steps(image_ids).cumsum(0) - 1
    for number, (rows, columns) in enumerate(grids):
        inside = image_ids == number
        positions[inside, H] = torch.arange(rows).repeat_interleave(columns)
        positions[inside, W] = torch.arange(columns).repeat(rows)
    return positions


def sequential_positions(image_ids: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Plain 1-D positions (p, p, p), one step per token, visual or not; shapes as in :func:`native_positions`."""
    return torch.arange(image_ids.shape[0])[:, None].expand(-1, 3).clone()


def _steps(image_ids: Tensor) -> Tensor:
    """1 where T advances: at every token that is not visual and at the first token of each image."""
    previous = torch.cat([image_ids.new_full((1,), NO_IMAGE), image_ids[:-1]])
    return ((image_ids == NO_IMAGE) | (image_ids != previous)).long()


@register_rope("native")
def _native() -> RopeVariant:
    """NEO: T turns the language model's channels, H and W turn their own new channels with their own bases."""

    def table(frequency_t: Sequence[float], base_h: float, base_w: float) -> PairTable:
        half = len(frequency_t)
        return pairs(T, frequency_t) + section(H, half, base_h) + section(W, half, base_w)

    return RopeVariant(native_positions, table)


@register_rope("1d")
def _one_dimensional() -> RopeVariant:
    """The language model's own positions; its table is repeated over the new channels."""

    def table(frequency_t: Sequence[float], base_h: float, base_w: float) -> PairTable:
        own = pairs(T, frequency_t)
        return own + own

    return RopeVariant(sequential_positions, table)


class Rotary(nn.Module):
    """Turns positions into cosines and sines of all pairs, once per batch.

    Args:
        kind: registered name of the variant.
        head_width: E, a multiple of 4.
        base_t: base of the T frequencies.
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
        rope_scaling: how the T frequencies are stretched (``scaling.py``); ``None``: not at all.
        rotary_width: how many of the T channels turn, the first ones; ``None``: all. The others keep frequency 0.

    Raises:
        ValueError: if the variant or the scaling is unknown, a width is not possible, or the variant's table does not
            have E pairs.
    """

    axis: Tensor
    frequency: Tensor

    def __init__(
        self,
        kind: str,
        head_width: int,
        base_t: float,
        base_h: float,
        base_w: float,
        rope_scaling: Mapping[str, Any] | None = None,
        rotary_width: int | None = None,
    ) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(
                f"head_width must be a multiple of 4 to split into T, H and W pairs, got {head_width}: give "
                "another, or take another language model, as one with such heads cannot be widened, so nothing can be "
                "attached to it"
            )
        turning = head_width if rotary_width is None else rotary_width
        if turning % 2 or not 0 <= turning <= head_width:
            raise ValueError(f"rotary_width must be even and lie in 0 to head_width ({head_width}), got {turning}")
        self._variant, self._kind, self._width, self._turning = rope_variant(kind), kind, head_width, turning
        self._bases = (base_t, base_h, base_w)
        self.scaling = rope_scaling if turning else None
        if self.scaling is not None:
            check_scaling(self.scaling, turning)
        self.index_rule = self._variant.index_rule
        self._tables: dict[int, PairTable] = {}
        self._loud = magnitude(self.scaling)
        self.register_buffer("axis", torch.tensor(self.table(0).axis, device="cpu"), persistent=False)
        self.register_buffer("frequency", self._frequency(0), persistent=False)

    def table(self, length_bucket: int) -> PairTable:
        """The pairs of documents of one rope length bucket (``rope_scaling.length_bucket_of``)."""
        if length_bucket not in self._tables:
            base_t, base_h, base_w = self._bases
            turning = frequencies(self.scaling, self._turning, base_t, length_bucket).tolist()
            resting = [0.0] * ((self._width - self._turning) // 2)
            table = self._variant.table([*turning, *resting], base_h, base_w)
            if len(table.axis) != self._width or len(table.frequency) != self._width:
                raise ValueError(
                    f"rope {self._kind!r} gives {len(table.axis)} axes and {len(table.frequency)} frequencies, "
                    f"not one each for the {self._width} pairs of a head"
                )
            self._tables[length_bucket] = table
        return self._tables[length_bucket]

    def _frequency(self, length_bucket: int) -> Tensor:
        return torch.tensor(self.table(length_bucket).frequency, dtype=torch.float32, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Moves with the model to another device, but not to another type: rounded frequencies turn far positions by
        wrong angles. Computed again rather than moved, so a model can also come from the meta device."""
        super()._apply(fn, recurse)
        device = self.frequency.device
        if device.type != "meta":
            self.axis, self.frequency = torch.tensor(self.table(0).axis, device=device), self._frequency(0).to(device)
        return self

    @torch.no_grad()
    def fill_tables(self) -> None:
        """Writes axes and frequencies where they lie: after a move from the meta device they hold nothing."""
        self.axis.copy_(torch.tensor(self.table(0).axis))
        self.frequency.copy_(self._frequency(0))

    def length_bucket(self, length: int) -> int:
        """Which set of frequencies a document of ``length`` T positions gets; see ``scaling.length_bucket_of``."""
        return length_bucket_of(self.scaling, length)

    @property
    def looks_at_length(self) -> bool:
        """Whether a document's length decides how it turns."""
        return self.scaling is not None and self.scaling["rope_type"] in ("longrope", "dynamic")

    def forward(self, positions: Tensor, document_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines.

        Args:
            positions: [B, L, 3].
            document_ids: [B, L]; ``None``: each row is one. Only looked at where a document's length decides how it
                turns.

        Returns:
            [B, L, 1, E] float32 each: one entry per pair, for any head.
        """
        frequency = self._by_document(positions, document_ids) if self.looks_at_length else self.frequency
        # Half precision would merge neighbouring positions, so the angle is float32 whatever the model's type.
        angle = positions[..., self.axis].float() * frequency
        cosines, sines = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
        if self._loud == 1.0:
            return cosines, sines
        loud = torch.ones_like(self.frequency)
        loud[: self._turning // 2] = self._loud
        return cosines * loud, sines * loud

    def _by_document(self, positions: Tensor, document_ids: Tensor | None) -> Tensor:
        """[B, L, E]: each token's frequencies, by its own document's length alone, so that neighbours never matter."""
        if document_ids is None:
            document_ids = torch.zeros(positions.shape[:2], dtype=torch.int64, device=positions.device)
        row = torch.arange(len(document_ids), device=document_ids.device)[:, None].expand_as(document_ids)
        _, document = torch.stack([row, document_ids]).flatten(1).unique(dim=1, return_inverse=True)
        last = positions[..., T].flatten()
        lengths = torch.zeros(int(document.max()) + 1, dtype=last.dtype, device=last.device)
        lengths = lengths.scatter_reduce(0, document, last, "amax") + 1
        length_buckets = [self.length_bucket(math.ceil(length)) for length in lengths.tolist()]
        kinds = sorted(set(length_buckets))
        table = torch.stack([self._frequency(kind) for kind in kinds]).to(self.frequency.device)
        index = torch.tensor([kinds.index(length_bucket) for length_bucket in length_buckets], device=last.device)
        return table[index[document]].view(*document_ids.shape, -1)


def rotate(parts: Sequence[Tensor], cosines: Tensor, sines: Tensor) -> Tensor:
    """Turns the sections of a query or key together.

    Args:
        parts: T, H and W sections, [B, L, heads, width of the section] each; a T section of which only the first
            channels turn comes as two.
        cosines: [B, L, 1, E], from :class:`Rotary`.
        sines: same shape.

    Returns:
        [B, L, heads, 2E], the first halves of all sections before the second halves. Queries and keys are ordered
        alike, so their products are those of the order T, H, W.
    """
    halves = [part.chunk(2, dim=-1) for part in parts]
    first, second = (torch.cat(half, dim=-1) for half in zip(*halves, strict=True))
    if not torch.compiler.is_compiling():
        return _Turn.apply(first, second, cosines, sines)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return turned.to(parts[0].dtype)


class _Turn(torch.autograd.Function):
    """Half as many passes over memory as torch's autograd takes; the gradient turns back by the same tables."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        turned = _turn(first.to(cosines.dtype), second.to(cosines.dtype), cosines, sines)
        return turned.to(first.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        first, second = grad.to(cosines.dtype).chunk(2, dim=-1)
        turned = _turn(first, second, cosines, -sines)
        first, second = turned.to(grad.dtype).chunk(2, dim=-1)
        return first, second, None, None


def _turn(first: Tensor, second: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """[B, L, heads, E] twice -> [B, L, heads, 2E], all of one type."""
    out = first.new_empty(*first.shape[:-1], 2 * first.shape[-1])
    one, two = out.chunk(2, dim=-1)
    torch.mul(first, cosines, out=one)
    one.addcmul_(second, sines, value=-1.0)
    torch.mul(second, cosines, out=two)
    two.addcmul_(first, sines)
    return out
