"""A native primitive that keeps less for the backward pass than autograd does, with equal results and weights.

It recomputes in the backward pass what is cheap to compute (selective recomputation, Korthikanti et al. 2022, arXiv
2205.05198): the outputs of norms and gates, and rotated queries and keys.
:class:`~neo_components.components.primitive.NativePrimitive` is the plain form; stacks are built of this one. Layers
that are more than the library's own (adapters, hooks, expert routing) are called as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from neo_components.components.attention import NativeAttention
from neo_components.components.block_inputs import Attend, BlockInputs
from neo_components.components.document_attention import HALF, SpanAttention
from neo_components.components.layers import GatedFeedForward, RMSNorm
from neo_components.components.primitive import NativePrimitive
from neo_components.components.recompute import Compute, keeps_inputs, linears_of, plain


class LeanPrimitive(NativePrimitive):
    """A :class:`NativePrimitive` that recomputes norms, gates, queries and keys in the backward pass."""

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """As the plain block; x [B, L, D] -> [B, L, D]."""
        if not keeps_inputs():
            return super().forward(x, inputs)
        norm_in, norm_attended, norm_between, norm_out = self.norms
        x = self.add(x, norm_attended(lean_attention(self.self_attn, norm_in, x, inputs)))
        return self.add(x, norm_out(lean_feed_forward(self.mlp, norm_between, x, inputs)))


def lean_attention(attention: nn.Module, norm: nn.Module, x: Tensor, inputs: BlockInputs) -> Tensor:
    """``attention(norm(x), inputs)``."""
    if type(attention) is not NativeAttention or not plain(attention, *attention.q_norms, *attention.k_norms):
        return attention(norm(x), inputs)
    a = attention
    q, k, v, q_hw, k_hw = linears_after(norm, x, (a.q_proj, a.k_proj, a.v_proj, a.q_proj_hw, a.k_proj_hw))
    norms, count = [*a.q_norms, *a.k_norms], len(a.q_norms)

    def rotated(q: Tensor, q_hw: Tensor, k: Tensor, k_hw: Tensor, *gains: Tensor) -> tuple[Tensor, Tensor]:
        with_gains = [
            partial(norm.function, weight=gain, eps=norm.eps, offset=norm.offset)
            for norm, gain in zip(norms, gains, strict=True)
        ]
        return a.rotated(q, q_hw, with_gains[:count], inputs), a.rotated(k, k_hw, with_gains[count:], inputs)

    weights = [norm.weight for norm in norms]
    out = attend_over(inputs.attend, rotated, (q, q_hw, k, k_hw, *weights), a.heads(v), a.scale)
    return a.o_proj(out.flatten(-2))


def attend_over(attend: Attend, compute: Compute, inputs: Sequence[Tensor], v: Tensor, scale: float) -> Tensor:
    """``attend(*compute(*inputs), v, scale)``; where the backend can, only ``inputs`` and ``v`` are kept.

    In half precision queries and keys are kept too: they are small then, and to recompute them is a larger part of a
    step whose matrix products are fast.
    """
    if isinstance(attend, SpanAttention) and v.dtype not in HALF:
        return attend.over(compute, inputs, v, scale)
    q, k = compute(*inputs)
    return attend(q, k, v, scale)


def lean_feed_forward(feed_forward: nn.Module, norm: nn.Module, x: Tensor, inputs: BlockInputs) -> Tensor:
    """``feed_forward(norm(x), inputs)``."""
    if type(feed_forward) is not GatedFeedForward or not plain(feed_forward):
        return feed_forward(norm(x), inputs)
    gate, up = linears_after(norm, x, (feed_forward.gate_proj, feed_forward.up_proj))
    return linears_of(feed_forward.gated, (gate, up), (feed_forward.down_proj,))[0]


def linears_after(norm: nn.Module, x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """``[linear(norm(x)) for linear in linears]``; the norm's output is not kept."""
    if isinstance(norm, RMSNorm) and plain(norm):
        return linears_of(partial(norm.function, eps=norm.eps, offset=norm.offset), (x, norm.weight), linears)
    x = norm(x)
    return tuple(linear(x) for linear in linears)
