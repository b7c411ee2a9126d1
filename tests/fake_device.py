"""A device without memory: its tensors have shapes and types but no values, those of the CPU have all three."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_device(name: str) -> Iterator[None]:
    """Inside, a device can be used that this machine does not have.

    Operations on its tensors are checked as ``FakeTensorMode`` checks them: whatever mixes devices raises, and so does
    whatever would read a value or needs one for the size of its result. All other operations get real tensors. Modules
    moved there get fake parameters.

    Args:
        name: of the device, for example ``cuda``. The autograd engine asks CUDA itself, so there is no backward pass
            on a fake ``cuda``; :func:`own_device` makes a device that has one.
    """
    mode, kind = FakeTensorMode(allow_non_fake_inputs=True), torch.device(name).type
    dispatch = mode.dispatch

    def chosen(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        if any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == kind) for x in leaves):
            return dispatch(func, types, args, kwargs or {})
        with unset_fake_temporarily():
            return func(*args, **(kwargs or {}))

    mode.dispatch = chosen  # type: ignore[method-assign]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        # Torch would ask the device itself if the process has an accelerator, as it has after own_device.
        with mock.patch.object(FakeTensorMode, "avoid_device_init", True), mode:
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def own_device(name: str) -> str:
    """Registers a device of that name, once per process, which is from then on the accelerator of the process. Its fake
    tensors have a backward pass."""
    from torch.utils import backend_registration as registration

    class Module(registration._DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16]

    registration._setup_privateuseone_for_python_backend(name, backend_module=Module())
    return name
