"""Layers of a block: RMSNorm (Zhang and Sennrich 2019) and the gated feed-forward (Shazeer 2020)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neo_components.components.block_inputs import BlockInputs
from neo_components.errors import one_of

NORMS = ("weight", "one_plus_weight")
"""How a norm's gain is kept: as the weight itself, or as its distance from 1 (Gemma)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name.

    Raises:
        ArgumentError: (a ``ValueError``) if there is none.
    """
    one_of("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 whatever the input's type and rounded once, at the end.

    Args:
        width: size of the last axis.
        eps: added to the mean square.
        norm: ``weight``: the gain is the weight; ``one_plus_weight``: the gain is 1 + weight.

    Raises:
        ValueError: if ``norm`` is neither.

    Attributes:
        function: what it computes, in the form of :func:`rms_norm`; ``liger.py`` has another.

    Source: Zhang and Sennrich 2019; as in Qwen3, and as in Gemma 3.
    """

    def __init__(self, width: int, eps: float = 1e-6, norm: str = "weight") -> None:
        super().__init__()
        one_of("norm", norm, NORMS)
        self.eps = eps
        self.offset = float(norm == "one_plus_weight")
        self.function: Callable[..., Tensor] = rms_norm
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A gain of 1."""
        self.weight.fill_(1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and type."""
        return self.function(x, self.weight, self.eps, self.offset)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """:class:`RMSNorm` as a function: x [..., width] and weight [width] -> the same shape and type as x."""
    gain = weight.float()
    if offset:
        gain = gain + offset
    if x.is_cpu and not torch.compiler.is_compiling():
        return _NormOnCPU.apply(x, gain, eps)
    return F.rms_norm(x.float(), weight.shape, gain, eps).to(x.dtype)


class _NormOnCPU(torch.autograd.Function):
    """``F.rms_norm`` on float32 copies, bit for bit, with its own gradient.

    Torch has no fused kernel for it on CPU. Its autograd keeps three float32 tensors of x's size for the backward pass
    and goes over them in many steps; this keeps x alone and one number per vector.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, gain, scale)
        return (wide * scale).mul_(gain).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gain, scale = ctx.saved_tensors
        normed, grad = x.float() * scale, grad.float()
        for_x = for_gain = None
        if ctx.needs_input_grad[1]:
            for_gain = (grad * normed).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            grad = grad * gain
            along = (grad * normed).mean(-1, keepdim=True)  # what only changes the length of x has no effect
            for_x = torch.addcmul(grad, normed, along, value=-1.0).mul_(scale).to(x.dtype)
        return for_x, for_gain, None


def gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``."""
    return activation(gate) * up


class GatedFeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))`` (Shazeer 2020): SwiGLU with ``silu``, GeGLU with ``gelu_tanh``.

    Args:
        hidden_size: D.
        feed_forward_size: width between the projections.
        activation: ``silu`` or ``gelu_tanh``.
        bias: whether the three projections have one.

    Raises:
        ValueError: if the activation is neither.

    Attributes:
        gated: ``gated(gate, up)``; ``liger.py`` has another.
    """

    def __init__(self, hidden_size: int, feed_forward_size: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.gated: Callable[[Tensor, Tensor], Tensor] = partial(gated, self.activation)
        self.gate_proj = nn.Linear(hidden_size, feed_forward_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, feed_forward_size, bias=bias)
        self.down_proj = nn.Linear(feed_forward_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, inputs: BlockInputs | None = None) -> Tensor:
        """x [..., D] -> [..., D]. ``inputs`` is ignored here; a feed-forward that routes by modality reads it."""
        return self.down_proj(self.gated(self.gate_proj(x), self.up_proj(x)))
