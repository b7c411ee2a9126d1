"""The native primitive: the block that pre-Buffer and post-LLM are made of (NEO paper equation 3)."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from neo_components.components.attention import NativeAttention
from neo_components.components.backends import prepare_attention
from neo_components.components.block_arguments import BlockArguments, complete_choices, flat_arguments
from neo_components.components.block_inputs import BlockInputs
from neo_components.components.component import Component
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.components.masks import LayerRule
from neo_components.components.moe import SparseFeedForward
from neo_components.components.rotary import rotary_of
from neo_components.errors import ArgumentError, one_of
from neo_components.registry import EXPERTS
from neo_components.types import kinds_of

PLACEMENTS = ("before", "after", "both")
"""Placement of the norms: on the inputs of attention and feed-forward, on their outputs (OLMo 2), or both (Gemma 3)."""


@flat_arguments
class NativePrimitive(Component):
    """One block: ``x' = x + attention(norm(x))``, then ``x' + feed_forward(norm(x'))`` (NEO paper equation 3).

    Alone it is used as ``block(x, block.prepare(positions, document_ids, image_ids))``; a stack prepares rotary tables
    and the attention backend once for all its blocks.

    Raises:
        ArgumentError: (a ``ValueError``) if a size or a name is not possible.
    """

    def __init__(self, **block: Unpack[BlockArguments]) -> None:
        super().__init__()
        layer_rule = LayerRule.choose(block["attention"], block["window"])
        one_of("norm_placement", block["norm_placement"], PLACEMENTS)
        if block["window"] is not None and block["window"] < 1:
            raise ArgumentError("window", f"must be 1 or more, or None for all tokens, got {block['window']}")
        self.keep_arguments(self.given | complete_choices(self.given))
        h = self.hparams
        self.layer_rule, self.residual_multiplier = layer_rule, h.residual_multiplier
        self.self_attn = NativeAttention(
            h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.norm_eps, h.qk_norm, h.norm, h.qkv_bias,
            h.output_bias, h.attention_scale, h.rotary_width,
        )  # fmt: skip
        self.mlp = self._feed_forward()
        self._make_norms()
        self.added = EXPERTS.make(h.experts, block=self)
        if not isinstance(self.self_attn, NativeAttention):
            raise ArgumentError(
                "experts",
                f"{h.experts!r} puts a {type(self.self_attn).__name__} in place of block.self_attn: derive it from "
                "NativeAttention, whose projections training groups, checkpoints and estimates look for",
            )

    def _feed_forward(self) -> nn.Module:
        h = self.hparams
        if h.num_experts is None:
            return GatedFeedForward(h.hidden_size, h.feed_forward_size, h.activation, h.feed_forward_bias)
        if h.feed_forward_bias:
            raise ArgumentError("feed_forward_bias", "is not supported beside num_experts: experts have no biases")
        return SparseFeedForward(
            h.hidden_size, h.feed_forward_size, h.num_experts, h.experts_per_token, h.normalize_experts, h.activation
        )

    def _make_norms(self) -> None:
        """The names are those of the families' own files: ``post_attention_layernorm`` norms the feed-forward's input
        in a block of placement ``before``, and the attention's output in the others."""
        h = self.hparams
        names = {
            "before": ("input_layernorm", "", "post_attention_layernorm", ""),
            "after": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
            "both": (
                "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        }  # fmt: skip
        self.norm_names = names[h.norm_placement]
        for name in filter(None, self.norm_names):
            self.add_module(name, RMSNorm(h.hidden_size, h.norm_eps, h.norm))

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """One block.

        Args:
            x: [B, L, D].
            inputs: what the block reads beside x.

        Returns:
            [B, L, D].
        """
        norm_in, norm_attended, norm_between, norm_out = self.norms
        x = self.add(x, norm_attended(self.self_attn(norm_in(x), inputs)))
        return self.add(x, norm_out(self.mlp(norm_between(x), inputs)))

    @property
    def norms(self) -> list[nn.Module]:
        """Norms before and after the attention, before and after the feed-forward; identities where there is none."""
        return [self.get_submodule(name) if name else _NO_NORM for name in self.norm_names]

    def add(self, x: Tensor, new: Tensor) -> Tensor:
        """The residual connection; Granite scales what is added."""
        return x + (new if self.residual_multiplier == 1.0 else new * self.residual_multiplier)

    def prepare(
        self,
        positions: Tensor,
        document_ids: Tensor,
        image_ids: Tensor,
        token_kinds: Tensor | None = None,
        backend: str = "auto",
    ) -> BlockInputs:
        """The inputs beside x of a block that is used alone; a stack prepares it once for all its blocks.

        Args:
            positions: [B, L, 3].
            document_ids: [B, L].
            image_ids: [B, L].
            token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
            backend: attention backend.
        """
        kinds = kinds_of(image_ids) if token_kinds is None else token_kinds
        rotary = rotary_of(self.hparams).to(positions.device)
        rule, window = self.layer_rule
        attend = prepare_attention(document_ids, image_ids, rule, backend, window, kinds)
        return BlockInputs(rotary(positions, document_ids), attend, image_ids, kinds)


_NO_NORM = nn.Identity()
