"""The native primitive, and a stack of them: what the pre-Buffer and the post-LLM have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from neo_components.components.attention import NativeAttention
from neo_components.components.backends import Attend, prepare_attention
from neo_components.components.component import Component
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.components.masks import LayerRule
from neo_components.components.moe import SparseFeedForward
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
