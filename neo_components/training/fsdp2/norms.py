"""Norms of gradients that may be sharded among processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from neo_components.storage.shards import local_of


def gradient_norms(parameters: Sequence[Tensor]) -> dict[int, Tensor]:
    """The norm of each parameter's full gradient, by the parameter's ``id``."""
    having = [parameter for parameter in parameters if parameter.grad is not None]
    if not any(isinstance(parameter, DTensor) for parameter in having):
        return {id(parameter): parameter.grad.norm() for parameter in having}  # type: ignore[union-attr]
    squares = torch.stack([local_of(p.grad).float().square().sum() for p in having])  # type: ignore[arg-type]
    dist.all_reduce(squares)
    return dict(zip(map(id, having), squares.sqrt(), strict=True))
