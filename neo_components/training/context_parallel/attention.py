"""Attention of several processes over one sequence: each computes some heads over the full length.

Outside attention a process holds a slice of the sequence with all heads. An all-to-all before attention exchanges
slices for heads, another one after it exchanges them back. A head attends over the full sequence with the full mask, so
every mask rule holds, also where an image lies in several slices.

Source: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from neo_components.components.block_inputs import Attend


class HeadParallelAttention:
    """An :class:`Attend` over slices, around one that was prepared for the full batch.

    Args:
        attend: attention backend of the full batch.
        group: the C processes that hold the slices, in order.
    """

    def __init__(self, attend: Attend, group: dist.ProcessGroup) -> None:
        self.attend, self.group = attend, group

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [B, L/C, N, 2E], k [B, L/C, K, 2E], v [B, L/C, K, E] -> [B, L/C, N, E]; C must divide N.

        Where C does not divide K, each key/value head is sent to all processes whose query heads read it.
        """
        times = kv_copies(k.shape[2], dist.get_world_size(self.group))
        if times > 1:
            k, v = (x.repeat_interleave(times, dim=2) for x in (k, v))
        q, k, v = slices_to_heads((q, k, v), self.group)
        return heads_to_slices(self.attend(q, k, v, scale), self.group)


def kv_copies(kv_heads: int, processes: int) -> int:
    """How often each key/value head is repeated, so that the processes get equally many.

    If the number of processes divides that of query heads, the repeated heads divide it too.
    """
    return processes // gcd(kv_heads, processes)


def slices_to_heads(parts: Sequence[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """[B, L/C, heads, width] each, all heads of this process's slice -> [B, L, heads/C, width], this process's heads of
    the full sequence. One exchange for all parts."""
    size = dist.get_world_size(group)
    split = [part.unflatten(2, (size, -1)).movedim(2, 0) for part in parts]  # [C, B, L/C, heads/C, width]
    received = _Exchange.apply(torch.cat([part.flatten(3) for part in split], dim=-1), group)
    full = received.movedim(0, 1).flatten(1, 2)
    shapes = [part.shape[3:] for part in split]
    found = full.split([shape.numel() for shape in shapes], dim=-1)
    return [part.unflatten(-1, shape) for part, shape in zip(found, shapes, strict=True)]


def heads_to_slices(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, L, heads/C, width] -> [B, L/C, heads, width]: the reverse."""
    size = dist.get_world_size(group)
    received = _Exchange.apply(x.unflatten(1, (size, -1)).movedim(1, 0), group)
    return received.movedim(0, 2).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """[C, ...] -> [C, ...]: entry i goes to process i, and entry j of the output comes from process j. That is its own
    inverse, so gradients return by the same exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.group), None


def _exchanged(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
