"""Counts operations for which the CPU would have to wait for a device."""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_unique", "_unique2",
    "unique_dim", "unique_consecutive", "unique_dim_consecutive", "histc",
}  # fmt: skip
"""Their results, or the sizes of these, depend on values."""
BY_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""These select if the index is a mask."""


class HostReads:
    """Context that notes every such operation, on tensors of any device, in the backward pass too.

    Attributes:
        found: (operation, the line of this project that called it).
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, str]] = []
        self._modes = _Operations(self.found), _Lists(self.found)

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, at)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        masks = any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if name in WAITING or (name in BY_INDEX and masks):
            self.found.append((name, _caller()))
        return func(*args, **(kwargs or {}))


class _Lists(TorchFunctionMode):
    """``tolist`` reads memory directly, without an operation."""

    def __init__(self, found: list[tuple[str, str]]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            self.found.append(("tolist", _caller()))
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    frames = [f for f in traceback.extract_stack()[:-2] if "/neo_components/" in f.filename or "/tests/" in f.filename]
    return f"{frames[-1].filename.split('/')[-1]}:{frames[-1].lineno}"
