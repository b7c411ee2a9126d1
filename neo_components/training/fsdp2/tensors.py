"""Functions for tensors that may be sharded by rows (dimension 0) among processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def rows_of(parameter: Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """The rows [start, stop) of a parameter in the shard of one rank."""
    size = -(-parameter.shape[0] // ranks)
    return min(rank * size, parameter.shape[0]), min((rank + 1) * size, parameter.shape[0])


def local_of(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. If it is sharded, all processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradient_norms(parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    """The norm of each parameter's full gradient, by the parameter's ``id``."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in having):
        return {id(parameter): parameter.grad.norm() for parameter in having}  # type: ignore[union-attr]
    squares = torch.stack([local_of(p.grad).float().square().sum() for p in having])  # type: ignore[arg-type]
    dist.all_reduce(squares)
    return dict(zip(map(id, having), squares.sqrt(), strict=True))
