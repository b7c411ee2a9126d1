"""Tensors that may be sharded by rows (dimension 0) among processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The rows [start, stop) of a tensor that this process holds."""
    if not isinstance(tensor, DTensor):
        return 0, len(tensor)
    mesh, rows = tensor.device_mesh, tensor.shape[0]
    size = -(-rows // mesh.size())
    return min(mesh.get_local_rank() * size, rows), min((mesh.get_local_rank() + 1) * size, rows)


def local_of(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor. If it is sharded, all processes must call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def set_rows(tensor: Tensor, full: Tensor) -> None:
    """Copies the rows of a full tensor that this process holds."""
    if tensor.dim() == 0:
        tensor.copy_(full)
        return
    start, stop = rows_of(tensor)
    local_of(tensor).copy_(full[start:stop])
