"""Models whose weights are told but not yet there: built on the meta device, filled later, piece by piece.

A model that is divided among processes never fits into one of them as a whole, so it cannot be built first and divided
afterwards. Under :class:`Deferred` a model is built on the meta device by the same code as always, and how each weight
comes about is noted: drawn at a certain state of the random numbers, read from a file, computed from another weight.
:class:`Source` then gives any rows of a weight, the same bits as if the model had been built at once, while only the
tensors that this one weight is made from are in memory.

The idea is that of deferred initialisation (Gibiansky et al., torchdistX); here it also covers weights from files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

OVERWRITING = {"normal_", "uniform_", "zero_", "fill_", "copy_"}
"""What leaves nothing of the values before; other changes in place need them."""


class Rows(Protocol):
    """Stored tensors that are read by rows (``weights.TensorFiles``)."""

    def get(self, name: str) -> Tensor: ...

    def rows(self, name: str, start: int, stop: int) -> Tensor: ...


class Made(Protocol):
    """How the values of one storage come about."""

    def make(self) -> Tensor:
        """A real tensor on the CPU over all of the storage."""


@dataclass(frozen=True)
class Stored:
    """Values from a file; ``change`` turns what is stored into the weight's form."""

    tensors: Rows
    name: str
    change: Callable[[Tensor], Tensor] | None
    size: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        stored = self.tensors.get(self.name)
        return (stored if self.change is None else self.change(stored)).to(self.dtype).contiguous()


@dataclass(frozen=True)
class Known:
    """Values that are there."""

    tensor: Tensor

    def make(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Source:
    """Where the values of one tensor come from: those of a storage, and its place in that.

    Args:
        made: how the storage comes about.
        size: shape.
        stride: steps between neighbours, in numbers.
        offset: first number, counted from where the values of the storage begin.
    """

    made: Made
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def value(self) -> Tensor:
        """All of it, on the CPU.

        Raises:
            ValueError: if it was never given a value.
        """
        if isinstance(self.made, Nothing):
            raise ValueError("a weight was never given a value; the module that owns it must set it when it is built")
        return self.of(self.made.make())

    def of(self, whole: Tensor) -> Tensor:
        """This tensor's place in the values of its storage."""
        return whole.as_strided(self.size, self.stride, whole.storage_offset() + self.offset)

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows [start, stop); of a stored tensor no others are read."""
        made = self.made
        if isinstance(made, Stored) and made.change is None and (made.size, 0) == (self.size, self.offset):
            return made.tensors.rows(made.name, start, stop).to(made.dtype)
        return self.value()[start:stop]


@dataclass(frozen=True)
class Computed:
    """The result of one operation; ``state`` of the random numbers before it, if it draws.

    ``into`` is the tensor that the operation changes, ``None`` if it makes a new one. If it leaves nothing of the
    tensor's old values, these are not looked at.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None
    into: Source | None = None
    keeps: bool = True

    def make(self) -> Tensor:
        args, kwargs = tree_map_only(Source, Source.value, (self.args, self.kwargs))
        with torch.random.fork_rng(devices=[], enabled=self.state is not None):
            if self.state is not None:
                torch.set_rng_state(self.state)
            if self.into is None:
                return self.operation(*args, **_on_cpu(kwargs))
            where = self.into
            whole = where.made.make()
            whole = whole.clone() if self.keeps else whole
            self.operation(where.of(whole), *args, **kwargs)
            return whole


@dataclass(frozen=True)
class Nothing:
    """A storage of that type and size that holds no values yet."""

    dtype: torch.dtype
    numbers: int

    def make(self) -> Tensor:
        return torch.empty(self.numbers, dtype=self.dtype)


class Deferred(TorchDispatchMode):
    """``with Deferred() as notes:`` notes how weights on the meta device come about.

    New parts are built under :func:`new_weights`; what is on the CPU is computed as usual. The random numbers run on as
    if all weights had been drawn.

    Attributes:
        paused: whether nothing is noted at the moment (:func:`unfilled`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self._made: dict[int, Made] = {}
        self._alive: list[Any] = []  # a storage's number must not be given to another one

    def __enter__(self) -> Deferred:
        _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.remove(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes one operation; torch calls it."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        draws = torch.Tag.nondeterministic_seeded in func.tags
        state = torch.get_rng_state() if draws else None
        changes = func._schema.is_mutable
        before = self.source(args[0]) if changes and _on_meta(args[0]) else None
        noted = tree_map_only(Tensor, lambda t: self.source(t) if t.is_meta else t, (args, kwargs))
        made = func(*args, **kwargs)
        if before is not None:
            self._change(func, args[0], before, noted, state)
        elif _on_meta(made) and not any(_on_meta(arg) and _number(arg) == _number(made) for arg in args):
            self._keep(made, Computed(func, noted[0], noted[1], state))  # a view has the values of its storage
            if draws:
                func(*args, **_on_cpu(kwargs))
        return made

    def _change(self, func: Any, target: Tensor, before: Source, noted: Any, state: Tensor | None) -> None:
        """Notes a change in place."""
        (_, *args), kwargs = noted
        whole = target.numel() * target.element_size() == target.untyped_storage().nbytes()
        keeps = not (whole and func._schema.name.removeprefix("aten::") in OVERWRITING)
        into = before if keeps else Source(Nothing(target.dtype, target.numel()), before.size, before.stride, 0)
        self._keep(target, Computed(func, tuple(args), kwargs, state, into, keeps))
        if state is not None:  # the random numbers run on
            func(torch.empty_strided(target.size(), target.stride(), dtype=target.dtype), *args, **kwargs)

    def _keep(self, tensor: Tensor, made: Made) -> None:
        storage = tensor.untyped_storage()
        self._made[_number(tensor)] = made
        self._alive.append(storage)

    def stored(self, tensor: Tensor, tensors: Rows, name: str, change: Callable[[Tensor], Tensor] | None) -> None:
        """Notes that a new tensor's values are those of that name in the files."""
        self._keep(tensor, Stored(tensors, name, change, tuple(tensor.shape), tensor.dtype))

    def source(self, tensor: Tensor) -> Source:
        """Where the values of a tensor come from; of one that is not on the meta device, itself."""
        if not tensor.is_meta:
            return Source(Known(tensor.detach()), tuple(tensor.size()), tensor.stride(), 0)
        numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
        made = self._made.get(_number(tensor), Nothing(tensor.dtype, numbers))
        return Source(made, tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()))

    def unset(self, tensor: Tensor) -> bool:
        """Whether a tensor on the meta device has no values to come yet."""
        return tensor.is_meta and isinstance(self.source(tensor).made, Nothing)

    def sources(self, module: nn.Module) -> dict[str, Source]:
        """Where each parameter of a module comes from."""
        return {name: self.source(parameter) for name, parameter in module.named_parameters()}

    def fill(self, module: nn.Module) -> None:
        """Gives all parameters of a (small) module their values, on the CPU."""
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                if parameter.is_meta:
                    value = self.source(parameter).value().clone()
                    setattr(part, name, nn.Parameter(value, parameter.requires_grad))


_active: list[Deferred] = []


def notes() -> Deferred | None:
    """The notes that are being taken, if any."""
    return _active[-1] if _active else None


@contextmanager
def unfilled() -> Iterator[None]:
    """Within it what is built has shapes but no values: no memory, no time, no random numbers are spent.

    For models whose weights are then read from files (``weights.load_strict``).
    """
    taken = notes()
    before = taken is not None and taken.paused
    if taken is not None:
        taken.paused = True
    try:
        with torch.device("meta"):
            yield
    finally:
        if taken is not None:
            taken.paused = before


@contextmanager
def new_weights() -> Iterator[None]:
    """Within it parts with random weights are built: at once, or on the meta device if notes are taken."""
    if notes() is None:
        yield
        return
    with torch.device("meta"):
        yield


@contextmanager
def filled(module: nn.Module) -> Iterator[None]:
    """Within it the weights of a module have their values, whether or not they are deferred."""
    if (taken := notes()) is None:
        yield
        return
    before = [(part, dict(part.named_parameters(recurse=False))) for part in module.modules()]
    taken.fill(module)
    try:
        yield
    finally:
        for part, parameters in before:
            for name, parameter in parameters.items():
                setattr(part, name, parameter)


def _number(tensor: Tensor) -> int:
    """Tells storages apart."""
    return tensor.untyped_storage()._cdata


def _on_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _on_cpu(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else dict(kwargs)
