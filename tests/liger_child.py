"""Run by ``test_liger.py`` under ``TRITON_INTERPRET=1``: Liger's kernels on CPU tensors beside the plain form.

Triton's interpreter hands on no float arguments and no functions of libdevice, so both are given to it here; what the
kernels do with them stays Liger's. It cannot compute with bfloat16.
"""

from __future__ import annotations

import json
from typing import Any

import liger_kernel.ops.geglu as geglu
import liger_kernel.ops.rms_norm as norms
import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from builders import random_batch, tiny_model
from torch import Tensor

from neo_components.components import liger
from neo_components.components.layers import GatedFeedForward, RMSNorm

convert = interpreter._implicit_cvt


def with_floats(argument: Any) -> Any:
    if type(argument) is not float:
        return convert(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)


@triton.jit
def rsqrt(x):  # type: ignore[no-untyped-def]
    return 1.0 / tl.sqrt(x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


interpreter._implicit_cvt, norms.rsqrt, geglu.tanh = with_floats, rsqrt, tanh


def results(part: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    out = part(x)
    out.float().square().sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in part.parameters())]
    part.zero_grad()
    return [tensor.float() for tensor in found]


def furthest(plain: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, other, strict=True))


def main() -> None:
    torch.manual_seed(0)
    report: dict[str, Any] = {}
    parts = {f"norm {form}": lambda form=form: RMSNorm(40, 1e-6, form) for form in ("weight", "one_plus_weight")}
    parts |= {f"gate {name}": lambda name=name: GatedFeedForward(40, 72, name) for name in ("silu", "gelu_tanh")}
    for name, make in parts.items():
        for dtype in (torch.float32, torch.float16):
            part = make().to(dtype)
            torch.nn.init.normal_(next(part.parameters()), 0.0, 0.3)
            x = torch.randn(2, 7, 40, dtype=dtype)
            plain = results(part, x)
            assert liger.use_liger(part) == 1
            report[f"{name} {dtype}".replace("torch.", "")] = furthest(plain, results(part, x))
    model = tiny_model(post={"norm": "one_plus_weight", "activation": "gelu_tanh"})
    batch, _ = random_batch(model.input_spec, seed=1, rows=1, documents=2)
    both = []
    for kernels in (False, True):
        if kernels:
            report["modules"] = liger.use_liger(model)
        model.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        both.append([loss.detach()[None], *(p.grad for p in model.parameters() if p.grad is not None)])
    report["model"] = furthest(*both)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
