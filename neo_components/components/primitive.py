"""The native primitive, and a stack of them: what the pre-Buffer and the post-LLM have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.attention import NativeAttention
from neo_components.components.backends import Attend, prepare_attention
from neo_components.components.component import Component
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.components.masks import mask_rule
from neo_components.components.rotary import Rotary


class NativePrimitive(Component):
    """One block: ``x + attention(norm(x))``, then ``x + feed_forward(norm(x))`` (NEO paper equation 3).

    Alone it is used as ``block(x, *block.prepare(positions, document_ids, image_ids))``; in a stack, rotary tables
    and the attention backend are prepared once for all blocks.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K, divides N.
        head_width: E, a multiple of 4.
        feed_forward_size: width of the gated feed-forward.
        norm_eps: of all norms.
        rope: registered name of the RoPE variant.
        base_t: base of the T frequencies.
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
        attention: registered name of the mask rule.

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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.self_attn = NativeAttention(hidden_size, num_heads, num_kv_heads, head_width, norm_eps)
        self.mlp = GatedFeedForward(hidden_size, feed_forward_size)
        self.input_layernorm = RMSNorm(hidden_size, norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """One block.

        Args:
            x: [B, L, D].
            rotary: cosines and sines, [B, L, 1, E] each.
            attend: prepared attention backend.

        Returns:
            [B, L, D].
        """
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))

    def prepare(
        self, positions: Tensor, document_ids: Tensor, image_ids: Tensor, backend: str = "auto"
    ) -> tuple[tuple[Tensor, Tensor], Attend]:
        """Rotary tables and attention for a block that is used alone; see :meth:`PrimitiveStack.forward`."""
        h = self.hparams
        rotary = Rotary(h.rope, h.head_width, h.base_t, h.base_h, h.base_w).to(positions.device)
        return rotary(positions), prepare_attention(document_ids, image_ids, h.attention, backend)


class PrimitiveStack(Component):
    """``depth`` primitives with one rotary table and one mask rule. Base of ``PreBuffer`` and ``PostLLM``.

    Args:
        depth: number of blocks.
        backend: attention backend, ``auto``, ``sdpa``, ``flex`` or ``eager``; a matter of speed, not saved as a weight.
        init_std: standard deviation of the initial projections.

    The other arguments are those of :class:`NativePrimitive`.

    Raises:
        ValueError: if ``depth`` is negative, or a size or a name is not possible.
    """

    def __init__(
        self,
        depth: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        feed_forward_size: int,
        norm_eps: float,
        rope: str,
        base_t: float,
        base_h: float,
        base_w: float,
        attention: str,
        backend: str,
        init_std: float,
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"depth must be 0 or more, got {depth}")
        mask_rule(attention)
        sizes: dict[str, Any] = {
            "hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_width": head_width,
            "feed_forward_size": feed_forward_size, "norm_eps": norm_eps, "rope": rope, "base_t": base_t,
            "base_h": base_h, "base_w": base_w, "attention": attention,
        }  # fmt: skip
        self.rotary = Rotary(rope, head_width, base_t, base_h, base_w)
        self.layers = nn.ModuleList(NativePrimitive(**sizes) for _ in range(depth))
        self.rule, self.backend = attention, backend
        init_linear(self.layers, init_std)

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
            attend: a backend prepared by the caller: one for all blocks or one each (a cache).
            hidden_states: filled with each block's output under ``layer_<first + i>``.
            first: number of the first block in the whole model.

        Returns:
            [B, L, D].
        """
        if not len(self.layers):
            return x
        if attend is None:
            attend = prepare_attention(document_ids, image_ids, self.rule, self.backend)
        rotary = self.rotary(positions)
        for number, layer in enumerate(self.layers):
            x = layer(x, rotary, attend[number] if isinstance(attend, Sequence) else attend)
            if hidden_states is not None:
                hidden_states[f"layer_{first + number}"] = x
        return x

    def hw_modules(self) -> list[nn.Module]:
        """The H/W projections and norms of all blocks."""
        return [part for layer in self.layers for part in layer.self_attn.hw_modules()]  # type: ignore[union-attr, operator]


@torch.no_grad()
def init_linear(module: nn.Module, std: float) -> None:
    """Normal(0, std) for every weight of a linear layer in ``module``, zero for every bias."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, std)
            if part.bias is not None:
                part.bias.zero_()
