"""Tensors that are divided among processes by rows, and those that are not, seen alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def rows_of(parameter: Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """First row and the row behind the last one of a parameter that one process keeps."""
    share = -(-parameter.shape[0] // ranks)
    return min(rank * share, parameter.shape[0]), min((rank + 1) * share, parameter.shape[0])


def local_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows, or all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process has to ask at the same time if it is divided."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norms(parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    """The norm of each parameter's gradient, by the parameter's ``id``; of divided ones that of all rows together."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in having):
        return {id(parameter): parameter.grad.norm() for parameter in having}  # type: ignore[union-attr]
    squares = torch.stack([local_of(p.grad).float().square().sum() for p in having])  # type: ignore[arg-type]
    dist.all_reduce(squares)
    return dict(zip(map(id, having), squares.sqrt(), strict=True))
