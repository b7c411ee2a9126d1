"""Models whose weights come later: built with them on the meta device, sharded, then filled by every process.

A sharded model never fits into one process, so it cannot be built first and sharded afterwards. Under :class:`Deferred`
a model is built by the same code as always, but what sets its weights (:func:`later`) waits for :func:`materialize`:
reading a file, or ``init_weights`` of a part with :func:`new_weights`. A weight on several processes gets its own rows
there: of a stored tensor no others are read, and a new one is drawn in full, one at a time, so that a start does not
depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from neo_components.storage.shards import full_tensor, local_of, set_rows

Fill = Callable[[], None]


class Initialized(Protocol):
    """A part that sets its own initial weights."""

    def init_weights(self) -> None: ...


Part = TypeVar("Part", bound=Initialized)


class Deferred:
    """``with Deferred() as deferred:`` keeps what sets weights on the meta device for later."""

    def __init__(self) -> None:
        self._fills: list[tuple[nn.Module, Fill]] = []

    def __enter__(self) -> Deferred:
        _active.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)

    def add(self, module: nn.Module, fill: Fill) -> None:
        """Keeps what sets weights of a module."""
        self._fills.append((module, fill))

    @torch.no_grad()
    def fill(self, part: nn.Module, keep: bool = False) -> None:
        """Gives a (small) part on the meta device its weights, on the CPU.

        Args:
            part: of the model.
            keep: whether what sets its weights is called again later.
        """
        parts = set(part.modules())
        if any(parameter.is_meta for parameter in part.parameters()):
            allocate(part, "cpu")
            _run(part, [fill for module, fill in self._fills if module in parts])
        if not keep:
            self._fills = [(module, fill) for module, fill in self._fills if module not in parts]

    def materialize(self, model: nn.Module, device: torch.device, known: Mapping[str, Tensor]) -> None:
        """Allocates all weights of a model on the meta device, sharded or not, and sets them; buffers keep theirs.

        Args:
            model: built under this ``Deferred``.
            device: of the weights.
            known: weights that had values when the model was built (:func:`to_meta`), by name.

        Raises:
            ValueError: if a weight is not a number after that; it is named.
        """
        allocate(model, device)

        def set_known() -> None:
            for name, value in known.items():
                set_rows(model.get_parameter(name), value)

        _run(model, [set_known, *(fill for _, fill in self._fills)])
        self._fills = []


@torch.no_grad()
def _run(model: nn.Module, fills: list[Fill]) -> None:
    for parameter in model.parameters():
        local_of(parameter).fill_(torch.nan)
    with _FullDraws():
        for fill in fills:
            fill()
    if unset := [name for name, parameter in model.named_parameters() if local_of(parameter).sum().isnan()]:
        raise ValueError(
            f"{len(unset)} weights are not a number after the start, for example {unset[0]}: no file gave them a value "
            "(or NaN), and init_weights of the part that owns them did not set them"
        )


class _FullDraws(TorchDispatchMode):
    """Draws random numbers of a sharded weight in full, on the CPU; each process keeps its rows."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation; torch calls it."""
        if torch.Tag.nondeterministic_seeded not in func.tags or not any(isinstance(arg, DTensor) for arg in args):
            return func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            raise TypeError(f"{func} draws a new tensor from a sharded one; initial weights are drawn in place")
        drawn = torch.empty(args[0].shape)
        func(drawn, *args[1:], **(kwargs or {}))
        set_rows(args[0], drawn)
        return args[0]


_active: list[Deferred] = []


def deferred() -> Deferred | None:
    """The ``Deferred`` under which a model is built, if any."""
    return _active[-1] if _active else None


def later(module: nn.Module, fill: Fill) -> None:
    """Sets weights of a module: now, or under :class:`Deferred` once they are allocated.

    Args:
        module: whose weights they are.
        fill: sets them in place.
    """
    if (kept := deferred()) is None:
        fill()
    else:
        kept.add(module, fill)


def new_weights(make: Callable[[], Part], seed: int | None = None) -> Part:
    """A part with random weights, set by its ``init_weights``: now, or under :class:`Deferred` later, to the same.

    Args:
        make: builds the part.
        seed: of its weights; ``None``: a number drawn from torch's generator.
    """
    seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
    # Draws of the constructor are not kept, so the generator must not notice them.
    with unfilled() if deferred() is not None else torch.random.fork_rng(devices=[]):
        part = make()
    assert isinstance(part, nn.Module)

    def draw() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            part.init_weights()

    later(part, draw)
    return part


@contextmanager
def unfilled() -> Iterator[None]:
    """Within it the weights of what is built have shapes but no values; no memory, time or random numbers are spent.

    Buffers have their values: no file brings them back if they are not persistent. For models whose weights are then
    read from files (``weights.load_strict``).
    """
    hook = register_module_parameter_registration_hook(_without_values)  # type: ignore[arg-type] # torch says: None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        hook.remove()


def _without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.is_meta:
        return parameter
    return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)


@contextmanager
def _keeping_buffers(model: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Moves buffers to a device, with their values, whatever happens to all tensors within it."""
    kept = [(part, dict(part.named_buffers(recurse=False))) for part in model.modules()]
    yield
    for part, buffers in kept:
        for name, buffer in buffers.items():
            setattr(part, name, buffer.to(device))


def allocate(model: nn.Module, device: torch.device | str) -> None:
    """Allocates the weights of a model on a device, without values; buffers move there with theirs."""
    with _keeping_buffers(model, device):
        model.to_empty(device=device)


def to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Puts all weights of a model on the meta device; buffers stay where they are.

    Returns:
        The weights that had values, by name.
    """
    known = {name: parameter.detach() for name, parameter in model.named_parameters() if not parameter.is_meta}
    with _keeping_buffers(model):
        model.to("meta")
    return known


@contextmanager
def filled(module: nn.Module) -> Iterator[None]:
    """Within it the weights of a module have their values, whether or not they are deferred."""
    if (kept := deferred()) is None:
        yield
        return
    before = [(part, dict(part.named_parameters(recurse=False))) for part in module.modules()]
    kept.fill(module, keep=True)
    try:
        yield
    finally:
        for part, parameters in before:
            for name, parameter in parameters.items():
                setattr(part, name, parameter)


@contextmanager
def gathered(*modules: nn.Module) -> Iterator[None]:
    """Within it the weights of (small) modules are full, also where they are sharded; then each process keeps its rows.
    All processes must enter it together."""
    sharded = [
        (part, name, parameter)
        for part in nn.ModuleList(modules).modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for part, name, parameter in sharded:
        setattr(part, name, nn.Parameter(full_tensor(parameter.detach()), parameter.requires_grad))
    yield
    for part, name, parameter in sharded:
        full = getattr(part, name)
        setattr(part, name, parameter)
        set_rows(parameter, full)
