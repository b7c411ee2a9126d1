"""A stack of native primitives, the base of the pre-Buffer and the post-LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.backends import prepare_attention
from neo_components.components.block_arguments import block_arguments, complete_choices
from neo_components.components.block_inputs import Attend, BlockInputs
from neo_components.components.checkpointing import checkpointed
from neo_components.components.compiling import allow_forms
from neo_components.components.component import Component
from neo_components.components.lean_primitive import LeanPrimitive
from neo_components.components.masks import LayerRule
from neo_components.components.moe import Experts
from neo_components.components.primitive import NativePrimitive
from neo_components.components.rotary import ROPE, Rotary, rotary_of
from neo_components.errors import ArgumentError
from neo_components.token_indices import TokenIndices
from neo_components.types import kinds_of

Prepared = dict[tuple[LayerRule, str], Attend]
"""Attention backends of one batch, by rule and name of the backend."""


class PrimitiveStack(Component):
    """``depth`` primitives. Base of ``PreBuffer`` and ``PostLLM``, whose arguments describe its blocks.

    Blocks that rotate by the same table share it, blocks that attend alike share a prepared backend.

    Attributes:
        checkpointed_blocks: how many blocks, from the first on, keep only their input for the backward pass
            (activation checkpointing).
        checkpoint_keeps: what else these keep, of ``checkpointing.KEEPS``.
    """

    layers: nn.ModuleList
    checkpointed_blocks: int = 0
    checkpoint_keeps: str = "input"

    def build(self, arguments: Mapping[str, Any]) -> None:
        """Keeps the arguments in ``hparams`` and makes the blocks.

        Args:
            arguments: of :class:`NativePrimitive`, ``depth``, ``backend``, ``init_std``, and the stack's own.

        Raises:
            ArgumentError: (a ``ValueError``) if ``depth`` is negative, or a size or a name is not possible.
        """
        self.keep_arguments({**arguments, **complete_choices(arguments)})
        h = self.hparams
        if h.depth < 0:
            raise ArgumentError("depth", f"must be 0 or more, got {h.depth}")
        self.backend = h.backend
        shared = block_arguments(h)
        blocks = [shared | self.block_changes(number) for number in range(h.depth)]
        self.rotaries, self._tables = share_tables(shared, blocks)
        self.layers = nn.ModuleList(LeanPrimitive(**block) for block in blocks)

    def init_weights(self) -> None:
        """Sets all weights of a new stack."""
        init_linear(self.layers, self.hparams.init_std)

    def block_changes(self, number: int) -> dict[str, Any]:
        """Arguments in which block ``number`` differs from the stack's."""
        return {}

    @property
    def blocks(self) -> list[NativePrimitive]:
        """The blocks; ``layers`` with their type."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def rotary(self) -> Rotary:
        """The table of the stack's own arguments; it holds the RoPE variant."""
        return self.rotaries[0]  # type: ignore[return-value]

    @property
    def layer_rules(self) -> list[LayerRule]:
        """Mask rule and window of each block."""
        return [block.layer_rule for block in self.blocks]

    def prepare(
        self,
        document_ids: Tensor,
        image_ids: Tensor,
        prepared: Prepared | None = None,
        token_kinds: Tensor | None = None,
        known: TokenIndices | None = None,
    ) -> list[Attend]:
        """The attention backend of every block for one batch.

        Args:
            document_ids: [B, L].
            image_ids: [B, L].
            prepared: backends that another stack prepared for this batch; used where they fit, and added to.
            token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
            known: what the CPU knows of the tokens; ``None``: nothing.
        """
        prepared = {} if prepared is None else prepared
        for rule in self.layer_rules:
            if (rule, self.backend) not in prepared:
                prepared[rule, self.backend] = prepare_attention(
                    document_ids, image_ids, rule.rule, self.backend, rule.window, token_kinds, known
                )
        return [prepared[rule, self.backend] for rule in self.layer_rules]

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        image_ids: Tensor,
        token_kinds: Tensor | None = None,
        *,
        attend: Attend | Sequence[Attend] | None = None,
        hidden_states: dict[str, Tensor] | None = None,
        first: int = 0,
        known: TokenIndices | None = None,
    ) -> Tensor:
        """All blocks.

        Args:
            x: [B, L, D].
            positions: [B, L, 3].
            document_ids: [B, L].
            image_ids: [B, L].
            token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
            attend: backends prepared by the caller: one for all blocks or one each (a cache).
            hidden_states: filled with each block's output under ``layer_<first + i>``.
            first: number of the first block in the whole model.
            known: what the CPU knows of the tokens (``Batch.known``); without it a device may be asked for it.

        Returns:
            [B, L, D].
        """
        kinds = kinds_of(image_ids) if token_kinds is None else token_kinds
        if attend is None:
            attend = self.prepare(document_ids, image_ids, token_kinds=kinds, known=known)
        tables = {number: self.rotaries[number](positions, document_ids, known) for number in sorted(set(self._tables))}
        for number, block in enumerate(self.layers):
            own = attend[number] if isinstance(attend, Sequence) else attend
            inputs = BlockInputs(tables[self._tables[number]], own, image_ids, kinds, known)
            if number < self.checkpointed_blocks and torch.is_grad_enabled():
                x = checkpointed(block, x, inputs, self.checkpoint_keeps)
            else:
                x = block(x, inputs)
            if hidden_states is not None:
                hidden_states[f"layer_{first + number}"] = x
        return self.behind_blocks(x)

    def behind_blocks(self, x: Tensor) -> Tensor:
        """What the stack computes behind its last block, [B, L, D] -> [B, L, D]: nothing, if not overridden."""
        return x

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compiles every block in place (``torch.compile``): names of weights stay. Blocks that are alike share the
        compiled code, and packed sequences of one length never make it compile again.

        Args:
            backend: of ``torch.compile``.
        """
        allow_forms()
        for block in self.layers:
            block.compile(backend=backend, dynamic=False)

    def hw_modules(self) -> list[nn.Module]:
        """The H/W projections and norms of all blocks."""
        return [part for block in self.blocks for part in block.self_attn.hw_modules()]

    def expert_modules(self) -> list[nn.Module]:
        """What expert routing by modality added to all blocks."""
        return [new for block in self.blocks for new, _ in block.added]

    def length_buckets(self, length: int) -> tuple[int, ...]:
        """Rope length buckets of a document of ``length`` T positions; where they change, cached keys are void."""
        return tuple(rotary.length_bucket(length) for rotary in self.rotaries)  # type: ignore[operator]


def share_tables(own: Mapping[str, Any], blocks: Sequence[Mapping[str, Any]]) -> tuple[nn.ModuleList, list[int]]:
    """One rotary table for all blocks that rotate alike.

    Args:
        own: arguments of the stack; its table comes first, needed or not, as it holds the RoPE variant.
        blocks: arguments of each block.

    Returns:
        The tables, and the number of each block's table.
    """
    known: dict[str, int] = {}
    tables = nn.ModuleList()
    numbers = []
    for arguments in (own, *blocks):
        key = repr([arguments[name] for name in ROPE])
        if key not in known:
            known[key] = len(tables)
            tables.append(rotary_of(arguments))
        numbers.append(known[key])
    return tables, numbers[1:]


@torch.no_grad()
def init_linear(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every weight of a linear layer or an expert in ``module``, zero for every bias; anything else
    that has weights starts as its own ``reset_parameters`` says."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std)
            if part.bias is not None:
                part.bias.zero_()
        elif isinstance(part, Experts):
            part.reset(std)
        elif next(part.parameters(recurse=False), None) is not None and callable(
            reset := getattr(part, "reset_parameters", None)
        ):
            reset()
