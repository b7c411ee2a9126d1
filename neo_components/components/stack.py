"""A stack of native primitives: what the pre-Buffer and the post-LLM have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from neo_components.components.backends import Attend, prepare_attention
from neo_components.components.component import Component
from neo_components.components.masks import LayerRule, mask_rule
from neo_components.components.moe import Experts
from neo_components.components.primitive import BLOCK, ROPE, NativePrimitive, rotary_of
from neo_components.components.rotary import Rotary

Prepared = dict[tuple[LayerRule, str], Attend]
"""Attention backends of one batch, by rule and name of the backend."""


class PrimitiveStack(Component):
    """``depth`` primitives. Base of ``PreBuffer`` and ``PostLLM``, whose arguments say what is in it.

    Blocks that turn by the same table share it, blocks that see the same tokens share a prepared backend.
    """

    layers: nn.ModuleList
    checkpointed_blocks: int = 0
    """How many blocks, from the first on, keep only their input for the backward pass and compute the rest again."""

    def build(self) -> None:
        """Makes the blocks from ``hparams``: arguments of :class:`NativePrimitive`, ``depth``, ``backend`` and
        ``init_std``.

        Raises:
            ValueError: if ``depth`` is negative, or a size or a name is not possible.
        """
        h = self.hparams
        if h.depth < 0:
            raise ValueError(f"depth must be 0 or more, got {h.depth}")
        mask_rule(h.attention)
        self.rule, self.backend = h.attention, h.backend
        shared = {name: h[name] for name in BLOCK}
        kinds = [shared | self.block_changes(number) for number in range(h.depth)]
        self.rotaries, self._tables = share_tables(shared, kinds)
        self.layers = nn.ModuleList(NativePrimitive(**kind) for kind in kinds)
        init_linear(self.layers, h.init_std)

    def block_changes(self, number: int) -> dict[str, Any]:
        """What block ``number`` has other than the stack's arguments say."""
        return {}

    @property
    def rotary(self) -> Rotary:
        """The table of the stack's own arguments; it knows the index rule."""
        return self.rotaries[0]  # type: ignore[return-value]

    @property
    def layer_rules(self) -> list[LayerRule]:
        """Whom the tokens of each block see."""
        return [layer.layer_rule for layer in self.layers]  # type: ignore[misc]

    def prepare(self, document_ids: Tensor, image_ids: Tensor, prepared: Prepared | None = None) -> list[Attend]:
        """The attention backend of every block for one batch.

        Args:
            document_ids: [B, L].
            image_ids: [B, L].
            prepared: backends that another stack prepared for this batch; used where they fit, and added to.
        """
        prepared = {} if prepared is None else prepared
        for rule in self.layer_rules:
            if (rule, self.backend) not in prepared:
                prepared[rule, self.backend] = prepare_attention(
                    document_ids, image_ids, rule.rule, self.backend, rule.window
                )
        return [prepared[rule, self.backend] for rule in self.layer_rules]

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        image_ids: Tensor,
        attend: Attend | Sequence[Attend] | None = None,
        hidden_states: dict[str, Tensor] | None = None,
        first: int = 0,
    ) -> Tensor:
        """All blocks.

        Args:
            x: [B, L, D].
            positions: [B, L, 3].
            document_ids: [B, L].
            image_ids: [B, L].
            attend: backends prepared by the caller: one for all blocks or one each (a cache).
            hidden_states: filled with each block's output under ``layer_<first + i>``.
            first: number of the first block in the whole model.

        Returns:
            [B, L, D].
        """
        if not len(self.layers):
            return x
        if attend is None:
            attend = self.prepare(document_ids, image_ids)
        turns = {number: self.rotaries[number](positions, document_ids) for number in sorted(set(self._tables))}
        for number, layer in enumerate(self.layers):
            see = attend[number] if isinstance(attend, Sequence) else attend
            turn = turns[self._tables[number]]
            if number < self.checkpointed_blocks and torch.is_grad_enabled():
                x = recompute(layer, x, turn, see, use_reentrant=False)
            else:
                x = layer(x, turn, see)
            if hidden_states is not None:
                hidden_states[f"layer_{first + number}"] = x
        return x

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block in place (``torch.compile``): names of weights stay. Blocks that are alike share the
        compiled code, and rows of one length never make it compile again.

        Args:
            backend: of ``torch.compile``.
        """
        for layer in self.layers:
            layer.compile(backend=backend, dynamic=False)

    def hw_modules(self) -> list[nn.Module]:
        """The H/W projections and norms of all blocks."""
        return [part for layer in self.layers for part in layer.self_attn.hw_modules()]  # type: ignore[union-attr, operator]

    def length_buckets(self, length: int) -> tuple[int, ...]:
        """Which frequencies a document of ``length`` T positions gets; where this changes, cached keys are void."""
        return tuple(rotary.length_bucket(length) for rotary in self.rotaries)  # type: ignore[operator]


def share_tables(own: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> tuple[nn.ModuleList, list[int]]:
    """One rotary table for all blocks that turn alike.

    Args:
        own: arguments of the stack; its table comes first, needed or not, as it knows the index rule.
        blocks: arguments of each block.

    Returns:
        The tables, and the number of each block's table.
    """
    places: dict[str, int] = {}
    tables = nn.ModuleList()
    numbers = []
    for arguments in (own, *blocks):
        key = repr([arguments[name] for name in ROPE])
        if key not in places:
            places[key] = len(tables)
            tables.append(rotary_of(arguments))
        numbers.append(places[key])
    return tables, numbers[1:]


@torch.no_grad()
def init_linear(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every weight of a linear layer or an expert in ``module``, zero for every bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, Experts):
            part.reset(std)
