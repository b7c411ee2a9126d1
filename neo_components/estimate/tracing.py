"""Counts what modules would keep for the backward pass, by running them on fake tensors (shapes without values).

The modules' own code runs, so there is no formula to keep up to date. Nothing is allocated, and a GPU is not needed to
trace for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

from neo_components.components.backends import EagerAttention
from neo_components.components.block_inputs import Attend
from neo_components.components.document_attention import Bucket, SpanAttention, make_buckets
from neo_components.components.flex_attention import at_least
from neo_components.components.masks import LayerRule
from neo_components.components.moe import SparseFeedForward


@dataclass(frozen=True)
class Setting:
    """Where and in which precision a step runs.

    Args:
        device: ``cpu`` or ``cuda``.
        autocast: type of the matrix products under autocast; ``None``: all in the weights' own type.
        weights: type of the weights; ``None``: that of each parameter.
    """

    device: str = "cpu"
    autocast: torch.dtype | None = None
    weights: torch.dtype | None = None


class SavedBytes:
    """Context that counts what autograd keeps for the backward pass, in bytes: every storage once.

    Storages are held until the object goes, so that none is counted twice or missed because its address is used again.

    Args:
        apart: tensors that are there anyway and do not count: weights, the batch.
    """

    def __init__(self, apart: Iterable[Tensor] = ()) -> None:
        self.bytes = 0
        self._held: dict[int, Any] = {}
        for tensor in apart:
            storage = tensor.untyped_storage()
            self._held[storage._cdata] = storage

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._held:
            self._held[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)


@contextmanager
def tracing(setting: Setting) -> Iterator[None]:
    """Tensors made inside are fake, and autocast is as the setting states, whether or not its device is there."""
    before = torch.is_autocast_enabled(setting.device), torch.get_autocast_dtype(setting.device)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            # torch.autocast("cuda") switches itself off on a machine without a GPU.
            torch.set_autocast_enabled(setting.device, setting.autocast is not None)
            if setting.autocast is not None:
                torch.set_autocast_dtype(setting.device, setting.autocast)
            torch.autocast_increment_nesting()
            yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(setting.device, before[0])
        torch.set_autocast_dtype(setting.device, before[1])


def fake(shape: Iterable[int], dtype: torch.dtype, setting: Setting, grad: bool = False) -> Tensor:
    """A tensor of that shape without values; inside :func:`tracing`."""
    return torch.empty(tuple(shape), dtype=dtype, device=setting.device, requires_grad=grad)


class Known(Tensor):
    """A tensor with values among fake ones: kinds of tokens, sizes of images.

    Code may choose by them (``x[kinds == 1]``) and read them (``grids.tolist()``). What is computed from known tensors
    alone is known; beside a fake tensor it is fake, and a known mask selects as many elements as it has.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and torch.device(args[1]).type != "cpu":
            return _beside(args[0], torch.device(args[1]))
        if func is Tensor.numpy:
            return args[0].as_subclass(Tensor).numpy()
        fakes = [x for x in tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
        if not fakes:
            with unset_fake_temporarily():
                return super().__torch_function__(func, types, args, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = (args[0], _places(args[1]), *args[2:])
        beside = partial(_beside, device=fakes[0].device)
        args, kwargs = tree_map_only(Known, beside, (args, kwargs))
        return func(*args, **kwargs)


def _beside(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device)


def _places(index: Any) -> tuple[Any, ...]:
    """An index in which known masks are the indices that they select."""
    found: list[Any] = []
    for one in index if isinstance(index, tuple) else (index,):
        mask = isinstance(one, Known) and one.dtype == torch.bool
        found += one.nonzero(as_tuple=True) if mask else [one]
    return tuple(found)


def known(values: Tensor) -> Tensor:
    """Those values, to be used inside :func:`tracing`."""
    return values.detach().cpu().as_subclass(Known)


def weights_of(module: nn.Module, setting: Setting) -> dict[str, Tensor]:
    """Fake weights of a module whose own may be on any device; inside :func:`tracing`."""
    made: dict[int, Tensor] = {}
    for parameter in module.parameters():
        dtype = setting.weights or parameter.dtype
        made[id(parameter)] = fake(parameter.shape, dtype, setting, parameter.requires_grad)
    return {name: made[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}


def kept_by(
    module: nn.Module, setting: Setting, inputs: Callable[[], tuple[Any, ...]], apart: Callable[[Any], Iterable[Tensor]]
) -> int:
    """Bytes that a module's forward pass keeps for the backward pass.

    Args:
        module: whose code is run; its weights may lie on the meta device.
        setting: where it runs.
        inputs: makes its fake arguments.
        apart: of them, the tensors that other modules share and that count elsewhere.
    """
    with tracing(setting):
        weights, arguments = weights_of(module, setting), inputs()
        with SavedBytes([*weights.values(), *apart(arguments)]) as saved:
            torch.func.functional_call(module, weights, arguments)
    return saved.bytes


def traced_attention(
    document_ids: Tensor, image_ids: Tensor, token_kinds: Tensor, rule: LayerRule, backend: str
) -> Callable[[Setting], tuple[Attend, list[Tensor]]]:
    """An attention backend for :func:`kept_by`, and the tensors that all its blocks share.

    Args:
        document_ids: [B, L], with values: they decide what is computed together.
        image_ids: [B, L].
        token_kinds: [B, L].
        rule: mask rule and window.
        backend: ``sdpa``, ``flex``, ``varlen`` or ``eager``.

    Returns:
        A function that makes the backend inside :func:`tracing`.
    """
    if backend == "eager":
        shape = document_ids.shape

        def eager(setting: Setting) -> tuple[Attend, list[Tensor]]:
            ids = fake(shape, torch.int64, setting)
            made = EagerAttention(ids, ids, *rule)
            return made, [made.mask]

        return eager
    if backend in ("flex", "varlen"):
        attend = _Fused.attend if backend == "flex" else _Fused.attend_padded
        return lambda setting: (attend, [])
    buckets = make_buckets(document_ids, image_ids, *rule, token_kinds=token_kinds)
    shapes = [(b, int(b.valid.sum()), b.mask is not None) for b in buckets]

    def spans(setting: Setting) -> tuple[Attend, list[Tensor]]:
        made = SpanAttention.__new__(SpanAttention)
        made.buckets, shared = [], []
        # These are computed from values, so they are set here: no unit of pairs, and only the number of real tokens.
        made.__dict__["units"] = []
        for bucket, real, masked in shapes:
            count, length = bucket.index.shape
            index, images, kinds = (fake((count, length), torch.int64, setting) for _ in range(3))
            mask = fake((count, 1, length, length), torch.bool, setting) if masked else None
            real_tokens = tuple(fake((real,), torch.int64, setting) for _ in range(2))
            one = Bucket(index, fake((count,), torch.int64, setting), images, kinds, rule.rule, rule.window)
            one.__dict__.update(mask=mask, real=real_tokens)
            made.buckets.append(one)
            shared += [index, *real_tokens, *([] if mask is None else [mask])]
        return made, shared

    return spans


class _Fused(torch.autograd.Function):
    """What a fused kernel such as FlexAttention's keeps: its inputs, its output, one number per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return _Fused.apply(q, k, v)

    @staticmethod
    def attend_padded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As FlashAttention: values as wide as queries."""
        return _Fused.apply(q, k, at_least(v, q.shape[-1]))[..., : v.shape[-1]]


@contextmanager
def evenly_routed(module: nn.Module) -> Iterator[None]:
    """Experts get equal numbers of tokens, as fake tokens have no values to route by."""
    parts = [part for part in module.modules() if isinstance(part, SparseFeedForward)]

    def even(part: SparseFeedForward) -> Callable[[Tensor], list[int]]:
        def tokens_of(chosen: Tensor) -> list[int]:
            experts = part.gate.out_features
            return [(chosen.numel() + n) // experts for n in range(experts)]

        return tokens_of

    for part in parts:
        part.tokens_of = even(part)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for part in parts:
            del part.tokens_of
