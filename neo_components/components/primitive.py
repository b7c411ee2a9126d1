"""The native primitive, and a stack of them: what the pre-Buffer and the post-LLM have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from neo_components.components.attention import NativeAttention
from neo_components.components.backends import Attend, prepare_attention
from neo_components.components.component import Component
from neo_components.components.experts import Experts, SparseFeedForward
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.components.masks import LayerRule, mask_rule
from neo_components.components.rotary import Rotary

PLACEMENTS = ("before", "after", "both")
"""Where a block norms: what goes into attention and feed-forward, what comes out (OLMo 2), or both (Gemma 3)."""


class NativePrimitive(Component):
    """One block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))`` (NEO paper equation 3).

    The defaults are NEO's, as on Qwen3; the arguments from ``rope_scaling`` on are what language models do otherwise.

    Alone it is used as ``block(x, *block.prepare(positions, document_ids, image_ids))``; in a stack, rotary tables
    and the attention backend are prepared once for all blocks.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K, divides N.
        head_width: E, a multiple of 4.
        feed_forward_size: width of the gated feed-forward, or of each expert.
        norm_eps: of all norms.
        rope: registered name of the RoPE variant.
        base_t: base of the T frequencies.
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
        attention: registered name of the mask rule.
        rope_scaling: how the T frequencies are stretched, a mapping as in ``scaling.py``; ``None``: not at all.
        rotary_width: how many of the T channels turn; ``None``: all, 0: none. H and W always turn.
        window: how many tokens back a token sees (``masks.seeing``); ``None``: all.
        attention_scale: factor of the scores; ``None``: ``1/sqrt(E)``.
        qk_norm: norm of the T channels of queries and keys: ``head``, ``whole`` or ``none``.
        qkv_bias: whether the projections to T queries, T keys and values have a bias.
        output_bias: whether the attention's output projection has one.
        norm: form of the norms' gain, ``weight`` or ``one_plus_weight``; the H/W norms always have the first.
        norm_placement: ``before``, ``after`` or ``both``.
        residual_multiplier: factor of what attention and feed-forward add to x.
        activation: of the feed-forward, ``silu`` or ``gelu_tanh``.
        feed_forward_bias: whether the feed-forward's projections have a bias.
        num_experts: number of experts; ``None``: one dense feed-forward.
        experts_per_token: how many of them a token uses.
        normalize_experts: whether the chosen experts' weights sum to 1.

    Raises:
        ValueError: if a size or a name is not possible.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        feed_forward_size: int,
        norm_eps: float = 1e-6,
        rope: str = "native",
        base_t: float = 1e6,
        base_h: float = 1e4,
        base_w: float = 1e4,
        attention: str = "mixed",
        rope_scaling: Mapping[str, Any] | None = None,
        rotary_width: int | None = None,
        window: int | None = None,
        attention_scale: float | None = None,
        qk_norm: str = "head",
        qkv_bias: bool = False,
        output_bias: bool = False,
        norm: str = "weight",
        norm_placement: str = "before",
        residual_multiplier: float = 1.0,
        activation: str = "silu",
        feed_forward_bias: bool = False,
        num_experts: int | None = None,
        experts_per_token: int = 8,
        normalize_experts: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if norm_placement not in PLACEMENTS:
            raise ValueError(f"norm_placement must be one of {', '.join(PLACEMENTS)}, got {norm_placement!r}")
        if window is not None and window < 1:
            raise ValueError(f"window must be 1 or more, or None for all tokens, got {window}")
        self.self_attn = NativeAttention(
            hidden_size, num_heads, num_kv_heads, head_width, norm_eps, qk_norm, norm, qkv_bias, output_bias,
            attention_scale, rotary_width,
        )  # fmt: skip
        if num_experts is None:
            self.mlp: nn.Module = GatedFeedForward(hidden_size, feed_forward_size, activation, feed_forward_bias)
        elif feed_forward_bias:
            raise ValueError("feed_forward_bias is not supported beside num_experts: experts have no biases")
        else:
            self.mlp = SparseFeedForward(
                hidden_size, feed_forward_size, num_experts, experts_per_token, normalize_experts, activation
            )
        self.layer_rule = LayerRule(attention, window)
        self.placement, self.residual_multiplier = norm_placement, residual_multiplier
        self._make_norms(hidden_size, norm_eps, norm)

    def _make_norms(self, width: int, eps: float, norm: str) -> None:
        """The names are those of the families' own files: ``post_attention_layernorm`` norms the feed-forward's input
        in a block of placement ``before``, and the attention's output in the others."""
        if self.placement != "after":
            self.input_layernorm = RMSNorm(width, eps, norm)
        self.post_attention_layernorm = RMSNorm(width, eps, norm)
        if self.placement == "both":
            self.pre_feedforward_layernorm = RMSNorm(width, eps, norm)
        if self.placement != "before":
            self.post_feedforward_layernorm = RMSNorm(width, eps, norm)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """One block.

        Args:
            x: [B, L, D].
            rotary: cosines and sines, [B, L, 1, E] each.
            attend: prepared attention backend.

        Returns:
            [B, L, D].
        """
        if self.placement == "before":
            x = self._add(x, self.self_attn(x, rotary, attend, self.input_layernorm))
            return self._add(x, self.mlp(x, self.post_attention_layernorm))
        if self.placement == "after":
            x = self._add(x, self.post_attention_layernorm(self.self_attn(x, rotary, attend)))
            return self._add(x, self.post_feedforward_layernorm(self.mlp(x)))
        attended = self.self_attn(x, rotary, attend, self.input_layernorm)
        x = self._add(x, self.post_attention_layernorm(attended))
        return self._add(x, self.post_feedforward_layernorm(self.mlp(x, self.pre_feedforward_layernorm)))

    def _add(self, x: Tensor, change: Tensor) -> Tensor:
        return x + change if self.residual_multiplier == 1.0 else x + change * self.residual_multiplier

    def prepare(
        self, positions: Tensor, document_ids: Tensor, image_ids: Tensor, backend: str = "auto"
    ) -> tuple[tuple[Tensor, Tensor], Attend]:
        """Rotary tables and attention for a block that is used alone; see :meth:`PrimitiveStack.run`."""
        rotary = rotary_of(self.hparams).to(positions.device)
        rule, window = self.layer_rule
        return rotary(positions, document_ids), prepare_attention(document_ids, image_ids, rule, backend, window)


BLOCK = tuple(inspect.signature(NativePrimitive).parameters)
"""Names of the arguments of one block."""

ROPE = ("rope", "head_width", "base_t", "base_h", "base_w", "rope_scaling", "rotary_width")
"""Those of them that its rotary table is made from, in the order of ``Rotary``."""


def rotary_of(arguments: Mapping[str, Any]) -> Rotary:
    """The rotary table that a block of these arguments turns by."""
    return Rotary(*(arguments[name] for name in ROPE))


Prepared = dict[tuple[LayerRule, str], Attend]
"""Attention backends of one batch, by rule and name of the backend."""


class PrimitiveStack(Component):
    """``depth`` primitives. Base of ``PreBuffer`` and ``PostLLM``, whose arguments say what is in it.

    Blocks that turn by the same table share it, blocks that see the same tokens share a prepared backend.
    """

    layers: nn.ModuleList
    recomputed: int = 0
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
            if number < self.recomputed and torch.is_grad_enabled():
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

    def regimes(self, length: int) -> tuple[int, ...]:
        """Which frequencies a document of ``length`` T positions gets; where this changes, cached keys are void."""
        return tuple(rotary.regime(length) for rotary in self.rotaries)  # type: ignore[operator]


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
