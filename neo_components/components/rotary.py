"""Rotary position embedding: one implementation, every variant as data.

A variant is an index rule (which T, H and W position a token has) and a table (which axis and which frequency each
pair of channels turns with). The channels of a query or key head lie in three sections, T (E channels, as in the
language model), H and W (E/2 channels each). Inside a section pair k joins channels k and k + width/2 ("rotate half").

Source: NEO paper equation 2; Su et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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


def section(axis: int, width: int, base: float) -> PairTable:
    """The pairs of one section of ``width`` channels: frequencies ``base ** (-2k / width)``, all on one axis."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return PairTable((axis,) * (width // 2), tuple((1.0 / base**exponents).tolist()))


@dataclass(frozen=True)
class RopeVariant:
    """A named variant.

    Args:
        index_rule: positions of a document's tokens.
        table: ``table(head_width, base_t, base_h, base_w)`` -> pairs of all three sections.
    """

    index_rule: IndexRule
    table: Callable[[int, float, float, float], PairTable]


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

    def table(head_width: int, base_t: float, base_h: float, base_w: float) -> PairTable:
        half = head_width // 2
        return section(T, head_width, base_t) + section(H, half, base_h) + section(W, half, base_w)

    return RopeVariant(native_positions, table)


@register_rope("1d")
def _one_dimensional() -> RopeVariant:
    """The language model's own positions; its table is repeated over the new channels."""

    def table(head_width: int, base_t: float, base_h: float, base_w: float) -> PairTable:
        own = section(T, head_width, base_t)
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

    Raises:
        ValueError: if the variant is unknown, or its table does not have E pairs.
    """

    axis: Tensor
    frequency: Tensor

    def __init__(self, kind: str, head_width: int, base_t: float, base_h: float, base_w: float) -> None:
        super().__init__()
        if head_width % 4:
            raise ValueError(f"head_width must be a multiple of 4 to split into T, H and W pairs, got {head_width}")
        variant = rope_variant(kind)
        with torch.device("cpu"):  # a table is numbers, also of a model that is built on the meta device
            table = variant.table(head_width, base_t, base_h, base_w)
        if len(table.axis) != head_width or len(table.frequency) != head_width:
            raise ValueError(f"rope {kind!r} gives {len(table.axis)} axes and {len(table.frequency)} frequencies, "
                             f"not one each for the {head_width} pairs of a head")  # fmt: skip
        self.index_rule = variant.index_rule
        self.register_buffer("axis", torch.tensor(table.axis), persistent=False)
        self.register_buffer("frequency", torch.tensor(table.frequency, dtype=torch.float32), persistent=False)
        self._table = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        """Moves with the model to another device, but not to another type: rounded frequencies turn far positions by
        wrong angles. Computed again rather than moved, so a model can also come from the meta device."""
        super()._apply(fn, recurse)
        self.axis = torch.tensor(self._table.axis, device=self.frequency.device)
        self.frequency = torch.tensor(self._table.frequency, dtype=torch.float32, device=self.frequency.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B, L, 3] -> cosines and sines, each [B, L, 1, E] float32 (one entry per pair, for any head)."""
        # Half precision would merge neighbouring positions, so the angle is float32 whatever the model's type.
        angle = positions[..., self.axis].float() * self.frequency
        return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def rotate(parts: Sequence[Tensor], cosines: Tensor, sines: Tensor) -> Tensor:
    """Turns the sections of a query or key together.

    Args:
        parts: T, H and W sections, [B, L, heads, width of the section] each.
        cosines: [B, L, 1, E], from :class:`Rotary`.
        sines: same shape.

    Returns:
        [B, L, heads, 2E], the first halves of all sections before the second halves. Queries and keys are ordered
        alike, so their products are those of the order T, H, W.
    """
    first = torch.cat([part[..., : part.shape[-1] // 2] for part in parts], dim=-1)
    second = torch.cat([part[..., part.shape[-1] // 2 :] for part in parts], dim=-1)
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)
    return turned.to(parts[0].dtype)
