"""Norms and gates by Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989), in place of the plain ones.

The modules and their weights stay; only the functions that they compute with are replaced, so what is recomputed in the
backward pass stays too (``lean_primitive.py``). On tensors outside of a GPU they compute the plain form.

Left out: Liger's fused linear cross-entropy. Targets here have weights of their own, which its one-pass form does not
take: with ``reduction="none"`` its backward pass forms all logits a second time. ``token_loss.py`` computes the same
chunks in one pass.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.layers import ACTIVATIONS, GatedFeedForward, RMSNorm, gated, rms_norm

INTERPRETED = "TRITON_INTERPRET"
"""Environment variable under which Triton runs kernels on a CPU, for tests."""


def installed() -> bool:
    """Whether the package liger-kernel is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def use_liger(module: nn.Module) -> int:
    """Makes every norm and gated feed-forward inside ``module`` compute with Liger's kernels; returns how many.

    Raises:
        ValueError: if the package is not installed.
    """
    if not installed():
        raise ValueError("the package liger-kernel is not installed: pip install liger-kernel")
    found = 0
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.function = liger_rms_norm
            found += 1
        elif isinstance(part, GatedFeedForward):
            part.gated = _GATES[part.activation]
            found += 1
    return found


def _here(x: Tensor) -> bool:
    """Whether the kernels run on a tensor; compilers fuse the plain form themselves."""
    return (x.is_cuda or os.environ.get(INTERPRETED) == "1") and not torch.compiler.is_compiling()


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """:func:`~neo_components.components.layers.rms_norm`: float32 inside and rounded once, which Liger calls gemma's
    way."""
    if not _here(x):
        return rms_norm(x, weight, eps, offset)
    # Not in place: the gradient that it would overwrite is also that of the residual connection.
    return _function("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply(x, weight, eps, offset, "gemma", False)


def liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``. Its backward pass writes into both, so that it can be taken once."""
    if not _here(gate):
        return gated(ACTIVATIONS["silu"], gate, up)
    return _function("liger_kernel.ops.swiglu", "LigerSiLUMulFunction").apply(gate, up)


def liger_geglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` by the tanh approximation; as :func:`liger_swiglu`."""
    if not _here(gate):
        return gated(ACTIVATIONS["gelu_tanh"], gate, up)
    return _function("liger_kernel.ops.geglu", "LigerGELUMulFunction").apply(gate, up)


_GATES: dict[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]] = {
    ACTIVATIONS["silu"]: liger_swiglu,
    ACTIVATIONS["gelu_tanh"]: liger_geglu,
}
