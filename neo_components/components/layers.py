"""Small layers shared by all components: the norm and the gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from neo_components.components.recompute import keeps_inputs, linears_of, plain

NORMS = ("weight", "one_plus_weight")
"""How a norm's gain is kept: as the weight itself, or as its distance from 1 (Gemma)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of that name.

    Raises:
        ValueError: if there is none.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 whatever the input's type and rounded once, at the end.

    Args:
        width: size of the last axis.
        eps: added to the mean square.
        norm: ``weight``: the gain is the weight; ``one_plus_weight``: the gain is 1 + weight.

    Raises:
        ValueError: if ``norm`` is neither.

    Source: Zhang and Sennrich 2019; as in Qwen3, and as in Gemma 3.
    """

    def __init__(self, width: int, eps: float = 1e-6, norm: str = "weight") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        self.eps = eps
        self.offset = float(norm == "one_plus_weight")
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and type."""
        return self.by(x, self.weight)

    def by(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same with the weight given, as a function of two tensors."""
        gain = weight.float()
        if self.offset:
            gain = gain + self.offset
        if x.is_cpu and not torch.compiler.is_compiling():
            return _NormOnCPU.apply(x, gain, self.eps)
        return F.rms_norm(x.float(), weight.shape, gain, self.eps).to(x.dtype)


def linears_after(norm: nn.Module | None, x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """``[linear(norm(x)) for linear in linears]``; what the norm gives is computed again in the backward pass.

    Args:
        norm: ``None``: x as it is.
        x: [..., D].
        linears: modules that take [..., D].
    """
    if keeps_inputs() and isinstance(norm, RMSNorm) and plain(norm):
        return linears_of(norm.by, (x, norm.weight), linears)
    x = x if norm is None else norm(x)
    return tuple(linear(x) for linear in linears)


class _NormOnCPU(torch.autograd.Function):
    """``F.rms_norm`` on float32 copies, bit for bit, with a gradient of its own.

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


class GatedFeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))`` (Shazeer 2020): SwiGLU with ``silu``, GeGLU with ``gelu_tanh``.

    Args:
        hidden_size: D.
        feed_forward_size: width between the projections.
        activation: ``silu`` or ``gelu_tanh``.
        bias: whether the three projections have one.

    Raises:
        ValueError: if the activation is neither.
    """

    def __init__(self, hidden_size: int, feed_forward_size: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = activation_of(activation)
        self.gate_proj = nn.Linear(hidden_size, feed_forward_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, feed_forward_size, bias=bias)
        self.down_proj = nn.Linear(feed_forward_size, hidden_size, bias=bias)

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """x [..., D] -> [..., D]; ``norm`` is what x passes first, given here so that its output need not be kept."""
        gate, up = linears_after(norm, x, (self.gate_proj, self.up_proj))
        return linears_of(self._gated, (gate, up), (self.down_proj,))[0]

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.activation(gate) * up
