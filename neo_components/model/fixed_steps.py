"""Decoding steps of fixed shapes: compiled, and on CUDA replayed as one CUDA graph.

A decoding step of a small batch is thousands of small kernels, and launching them takes longer than reading the weights
that they compute with. A CUDA graph launches them at once; ``torch.compile`` makes them fewer. Each block is compiled
alone: blocks that are alike share the code, so that it takes the time of one block.

Source: PyTorch's gpt-fast (static cache, CUDA graph, and matrix-vector products as tuned reductions).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from neo_components.components.block_inputs import BlockInputs
from neo_components.components.compiling import compiled
from neo_components.components.primitive import NativePrimitive
from neo_components.components.rotary import Rotary
from neo_components.model.decoding import Decoder

log = logging.getLogger(__name__)

GRAPH_FROM = 32
"""New tokens from which a CUDA graph is captured without being asked for."""
Step = Callable[[], None]


def looks_at_length(model: Any) -> bool:
    """Whether the length of a document selects the frequencies that it is rotated by."""
    return any(isinstance(part, Rotary) and part.looks_at_length for part in model.modules())


def has_fixed_steps(model: Any, device: torch.device, new: int, compile: bool | None) -> bool:
    """Whether all steps have the same shapes.

    Args:
        model: a ``NEO``.
        device: that it is on.
        new: most tokens to add.
        compile: see :func:`~neo_components.model.generation.generate`.

    Raises:
        ValueError: if they cannot, but ``compile`` is ``True``, or ``compile`` is something else.
    """
    if compile is not None and not isinstance(compile, bool):
        raise ValueError(f"compile must be True, False or None, got {compile!r}")
    by_length = looks_at_length(model)
    if compile and by_length:
        raise ValueError(
            "compile=True, but the rope_scaling of this model (longrope or dynamic) selects frequencies by the length "
            "of a document, so that its steps differ; generate with compile=False"
        )
    if compile is not None:
        return compile
    # Sharded weights are gathered in every step, which no graph of one process can hold.
    sharded = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    return device.type == "cuda" and new >= GRAPH_FROM and not by_length and not sharded


@contextmanager
def prepared_step(decoder: Decoder, fixed: bool, compile: bool) -> Iterator[Step]:
    """The fastest form of ``decoder.step``, which gives the same tokens.

    Args:
        decoder: that has taken its first token.
        fixed: whether all steps have the same shapes.
        compile: whether they are compiled.
    """
    with _compiled(decoder) if compile else nullcontext():
        yield GraphedStep(decoder, must=compile) if fixed and decoder.tokens.is_cuda else decoder.step


@contextmanager
def _compiled(decoder: Decoder) -> Iterator[None]:
    """Compiles the parts of a step. The model's blocks are called in their compiled form inside, and are as before
    afterwards."""
    on_cuda = decoder.tokens.is_cuda
    with blocks_as(decoder.model, lambda block: partial(_compiler(on_cuda)(_call), block)):
        try:
            decoder.begin = _compiler(on_cuda)(decoder.begin)  # type: ignore[method-assign]
            if not decoder.choose.do_sample:
                decoder.take = _compiler(on_cuda)(decoder.take)  # type: ignore[method-assign]
            yield
        finally:  # an object that refers to itself would keep the cache
            decoder.__dict__.pop("begin", None)
            decoder.__dict__.pop("take", None)


@contextmanager
def blocks_as(model: Any, form: Callable[[NativePrimitive], Callable[..., Tensor] | None]) -> Iterator[None]:
    """Calls the model's blocks in another form inside: ``form(block)``, or uncompiled where that is ``None``."""
    blocks = [part for part in model.modules() if isinstance(part, NativePrimitive)]
    before = [block._compiled_call_impl for block in blocks]
    try:
        for block in blocks:
            block._compiled_call_impl = form(block)
        yield
    finally:
        for block, call in zip(blocks, before, strict=True):
            block._compiled_call_impl = call


def _call(block: NativePrimitive, x: Tensor, inputs: BlockInputs) -> Tensor:
    return block._call_impl(x, inputs)


@lru_cache(maxsize=2)
def _compiler(on_cuda: bool) -> Any:
    # On CUDA this also makes matrix-vector products, which are bound by bandwidth, reductions of tuned sizes.
    options = {"coordinate_descent_tuning": True} if on_cuda else None
    return partial(compiled, dynamic=False, options=options)


class GraphedStep:
    """A step that is captured as a CUDA graph at its third call.

    The first call compiles and allocates whatever is made once. The second one checks that nothing waits for the host,
    which a graph cannot hold. Both are full steps of the generation.

    Args:
        decoder: whose steps have fixed shapes.
        must: raise ``ValueError`` where a step waits for the host; otherwise that is logged once and steps are launched
            one by one.
    """

    def __init__(self, decoder: Decoder, must: bool) -> None:
        self._decoder, self._must = decoder, must
        self._next: Step = self._first

    def __call__(self) -> None:
        """One step."""
        self._next()

    def _first(self) -> None:
        self._decoder.step()
        self._next = self._second

    def _second(self) -> None:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        waits: RuntimeError | None = None
        try:
            self._decoder.step()
        except RuntimeError as error:
            waits = error
        finally:
            torch.cuda.set_sync_debug_mode(before)
        if waits is None:
            self._next = self._capture
        else:
            self._one_by_one(waits, "synchroniz")

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        if self._decoder.choose.generator is not None:
            graph.register_generator_state(self._decoder.choose.generator)
        stream = torch.cuda.current_stream()
        try:
            # Other threads, such as those of a data loader, may go on allocating.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._decoder.step()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a capture that cannot be ended leaves its own
            return self._one_by_one(error, "captur")
        self._next = graph.replay
        self._next()

    def _one_by_one(self, error: RuntimeError, cause: str) -> None:
        """Does the step again, uncaptured as all that follow, if an error's text names this cause."""
        if cause not in str(error):
            raise error
        if self._must:
            raise ValueError(
                "compile=True, but a decoding step of this model waits for the host, which no CUDA graph can hold "
                f"({error}); generate with compile=False, or let the part compute without reading from the device"
            ) from error
        log.warning("no CUDA graph, as a decoding step of this model waits for the host: %s", error)
        self._next = self._decoder.step
        self._next()
