"""Selective recomputation: linear layers that keep, for the backward pass, what their input was computed from.

A linear layer needs its input again for the gradient of its weight. The output of a norm or a gate is cheap to
recompute from tensors that are kept anyway, so keeping it too would only cost memory.

Source: Korthikanti et al. 2022, arXiv 2205.05198 (selective activation recomputation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Compute = Callable[..., Any]
"""A cheap, differentiable function of tensors that draws no random numbers."""


def plain(*modules: nn.Module) -> bool:
    """Whether calling these modules does nothing but compute with their own weights: no hook, no wrapped class."""
    return all(
        type(module).__call__ is nn.Module.__call__
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
        and not (module._backward_pre_hooks or hasattr(module, "parametrizations"))
        for module in modules
    )


def keeps_inputs() -> bool:
    """Whether there is a backward pass to keep something for, and no compiler that chooses what."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled()


def linears_of(compute: Compute, inputs: Sequence[Tensor], linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """Several linear layers over ``compute(*inputs)``, of which only ``inputs`` are kept.

    Without gradients, under ``torch.compile`` (which chooses what to keep) and for modules that are more than
    an ``nn.Linear`` (adapters, hooks), it calls ``compute``, then the modules.

    Args:
        compute: gives [..., D].
        inputs: every tensor that it computes with and that may need a gradient.
        linears: D to any width each.

    Returns:
        One output per layer.
    """
    if not keeps_inputs() or not all(type(linear) is nn.Linear and plain(linear) for linear in linears):
        x = compute(*inputs)
        return tuple(linear(x) for linear in linears)
    weights = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    return _Linears.apply(compute, autocast_type(inputs[0]), len(inputs), *inputs, *weights)


def autocast_type(x: Tensor) -> torch.dtype | None:
    """What autocast rounds a matrix product's factors to; ``None`` outside of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def again(compute: Compute, tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Any, list[Tensor]]:
    """Recomputes ``compute`` with a graph: its result, and those of its inputs that need a gradient."""
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    with torch.enable_grad():
        result = compute(*leaves)
    return result, [leaf for leaf in leaves if leaf.requires_grad]


def spread(found: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the inputs that need one, at their positions among all inputs."""
    rest = iter(found)
    return [next(rest) if need else None for need in needed]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, compute: Compute, dtype: torch.dtype | None, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.compute, ctx.dtype, ctx.count = compute, dtype, count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            x = _rounded(compute(*tensors[:count]), dtype)
            pairs = zip(tensors[count::2], tensors[count + 1 :: 2], strict=True)
            return tuple(F.linear(x, _rounded(weight, dtype), _rounded(bias, dtype)) for weight, bias in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, needed = ctx.count, ctx.needs_input_grad[3:]
        saved = ctx.saved_tensors  # read once: under activation checkpointing each access recomputes them
        inputs, weights = saved[:count], saved[count:]
        with torch.autocast(inputs[0].device.type, enabled=False):
            result, leaves = again(ctx.compute, inputs, needed[:count])
            x = _rounded(result.detach(), ctx.dtype).flatten(0, -2)
            for_x: Tensor | None = None
            for_weights: list[Tensor | None] = []
            for index, grad in enumerate(grads):
                weight, bias = weights[2 * index : 2 * index + 2]
                of_weight, of_bias = needed[count + 2 * index : count + 2 * index + 2]
                if grad is None:
                    for_weights += [None, None]
                    continue
                grad = grad.flatten(0, -2)
                if leaves:
                    factor = _rounded(weight, ctx.dtype)
                    for_x = grad @ factor if for_x is None else for_x.addmm_(grad, factor)
                for_weights.append((grad.T @ x).to(weight.dtype) if of_weight else None)
                for_weights.append(grad.sum(0).to(bias.dtype) if of_bias else None)
            found: Sequence[Tensor] = ()
            if leaves and for_x is not None:
                found = torch.autograd.grad(result, leaves, for_x.view_as(result).to(result.dtype))
        return None, None, None, *spread(found, needed[:count] if found else [False] * count), *for_weights


def _rounded(x: Tensor | None, dtype: torch.dtype | None) -> Any:
    return x if x is None or dtype is None or not x.is_floating_point() else x.to(dtype)
