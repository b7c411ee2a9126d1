"""How many bytes of activations a training step keeps for its backward pass, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.block_inputs import BlockInputs
from neo_components.components.bridge import Bridge
from neo_components.components.checkpointing import products_of
from neo_components.components.primitive import NativePrimitive
from neo_components.components.stack import PrimitiveStack
from neo_components.estimate.flops import trains
from neo_components.estimate.tracing import Setting, evenly_routed, fake, kept_by, known, traced_attention
from neo_components.model.neo import NEO
from neo_components.types import IGNORED, Batch


@dataclass(frozen=True)
class Block:
    """Bytes that one block keeps.

    Args:
        full: all that its backward pass needs.
        input: its input, and what else activation checkpointing keeps (``checkpoint_keeps``).
    """

    full: int
    input: int


@dataclass(frozen=True)
class Activations:
    """Bytes that a step keeps for its backward pass.

    Args:
        patch_embedding: by the patch embedding.
        bridges: by the bridges.
        pre_buffer: by each block of the pre-Buffer.
        post_llm: by each block of the post-LLM.
        head: by the final norm.
        loss: gradients of the target tokens' states and of the head, which the loss computes beside the logits; the
            logits themselves are made in chunks and not kept.
        shared: rotary tables, masks and indices that blocks share.
    """

    patch_embedding: int = 0
    bridges: int = 0
    pre_buffer: list[Block] = field(default_factory=list)
    post_llm: list[Block] = field(default_factory=list)
    head: int = 0
    loss: int = 0
    shared: int = 0

    def total(self, pre_recomputed: int = 0, post_recomputed: int = 0) -> int:
        """Bytes kept if the first blocks of both stacks keep only their input."""
        kept = self.patch_embedding + self.bridges + self.head + self.loss + self.shared
        for blocks, again in ((self.pre_buffer, pre_recomputed), (self.post_llm, post_recomputed)):
            kept += sum(block.input if n < again else block.full for n, block in enumerate(blocks))
        return kept

    def on_each_of(self, devices: int) -> Activations:
        """What each of several devices keeps that compute the step together, by context parallelism: masks, and at most
        the gradients of the loss, are not split."""

        def split(blocks: list[Block]) -> list[Block]:
            return [Block(block.full // devices, block.input // devices) for block in blocks]

        return Activations(
            self.patch_embedding // devices, self.bridges // devices, split(self.pre_buffer), split(self.post_llm),
            self.head // devices, self.loss, self.shared,
        )  # fmt: skip

    def largest(self, pre_recomputed: int, post_recomputed: int) -> int:
        """Bytes of the largest checkpointed block: the backward pass recomputes one at a time in full."""
        again = [*self.pre_buffer[:pre_recomputed], *self.post_llm[:post_recomputed]]
        return max((block.full for block in again), default=0)


def kept_activations(model: NEO, batch: Batch, setting: Setting) -> Activations:
    """Bytes of activations of a step on a batch, by tracing the model's own code on fake tensors.

    What trains is read off ``requires_grad``. Experts are taken to be used evenly.

    Args:
        model: its weights may lie on the meta device.
        batch: packed sequences; the ids, labels and sizes of images are read, of the patches only their number.
        setting: device and precision of the step.
    """
    trace = _Trace(model, batch, setting)
    with evenly_routed(model):
        return trace.run()


class _Trace:
    """One tracing of a model: equal blocks are traced once."""

    def __init__(self, model: NEO, batch: Batch, setting: Setting) -> None:
        self.model, self.batch, self.setting = model, batch, setting
        self.known: dict[Any, int] = {}
        self.shared: dict[Any, int] = {}
        self.attention: dict[Any, Any] = {}

    def run(self) -> Activations:
        model, batch = self.model, self.batch
        words, images = trains(model.post_llm.word_embedding), trains(model.patch_embedding)
        count, length = batch.token_ids.shape
        ids = batch.document_ids, batch.image_ids, batch.token_kinds
        passing = model.route.passing(batch)
        own = passing.document_ids, passing.image_ids, passing.token_kinds
        own_shape = passing.document_ids.shape[0], passing.document_ids.shape[1]
        flow = images or model.pre_buffer.boundary.requires_grad
        if model.route.words_pass:
            flow = flow or words or (model.bridge_in is not None and trains(model.bridge_in))
        bridges = self._linear(model.bridge_in, (count, length), words)
        pre, flow = self._stack(model.pre_buffer, own, own_shape, flow)
        bridges += self._linear(model.bridge_out, own_shape, flow)
        flow = flow or words or (model.bridge_out is not None and trains(model.bridge_out))
        post, flow = self._stack(model.post_llm, ids, (count, length), flow)
        patches = self._patches() if len(batch.patches) else 0
        head, loss = self._head(count, length, flow)
        return Activations(patches, bridges, pre, post, head, loss, sum(self.shared.values()))

    def _stack(
        self, stack: PrimitiveStack, ids: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int], flow: bool
    ) -> tuple[list[Block], bool]:
        found = []
        for layer in stack.blocks:
            full = self._block(layer, ids, shape, flow, stack.backend)
            flow = flow or trains(layer)
            tokens = shape[0] * shape[1]
            kept = tokens * stack.hparams.hidden_size * self._size(layer)
            if stack.checkpoint_keeps == "products":
                dtype = self.setting.autocast or self._dtype(layer)
                kept += products_of(layer, tokens) * dtype.itemsize
            found.append(Block(full, kept if flow else 0))
        return found, flow

    def _block(
        self, block: NativePrimitive, ids: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int], flow: bool,
        backend: str,
    ) -> int:  # fmt: skip
        if backend == "auto":
            backend = "flex" if self.setting.device == "cuda" else "sdpa"
        rule = block.layer_rule
        weights = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
        key = (weights, repr(block.hparams), rule, shape, flow, backend)
        if key not in self.known:
            where = (rule, backend, shape)
            if where not in self.attention:
                self.attention[where] = traced_attention(*ids, rule, backend)
            self.known[key] = self._trace(block, where, ids[1:], shape, flow)
        return self.known[key]

    def _trace(
        self, block: NativePrimitive, where: tuple[Any, ...], ids: Sequence[Tensor], shape: tuple[int, int], flow: bool
    ) -> int:
        hidden, width = block.hparams.hidden_size, block.hparams.head_width
        dtype = self._dtype(block)
        image_ids, kinds = map(known, ids)

        def inputs() -> tuple[Any, ...]:
            attend, shared = self.attention[where](self.setting)
            x = fake((*shape, hidden), dtype, self.setting, flow)
            rotary = [fake((*shape, 1, width), torch.float32, self.setting) for _ in range(2)]
            self.shared[where] = sum(tensor.nbytes for tensor in shared)
            self.shared["rotary", shape, width] = 2 * rotary[0].nbytes
            self.apart = [*shared, *rotary]
            return x, BlockInputs((rotary[0], rotary[1]), attend, image_ids, kinds)

        return kept_by(block, self.setting, inputs, lambda _: self.apart)

    def _patches(self) -> int:
        part, count = self.model.patch_embedding, len(self.batch.patches)
        grids = known(self.batch.image_grids)

        def inputs() -> tuple[Any, ...]:
            pixels = fake(self.batch.patches.shape, self.batch.patches.dtype, self.setting)
            return pixels, fake((count, 2), torch.int64, self.setting), grids

        return kept_by(part, self.setting, inputs, lambda arguments: arguments)

    def _linear(self, part: Bridge | None, shape: tuple[int, int], flow: bool) -> int:
        if part is None:
            return 0
        width, dtype = part.hparams.in_width, self._dtype(part)
        return kept_by(part, self.setting, lambda: (fake((*shape, width), dtype, self.setting, flow),), lambda _: ())

    def _head(self, count: int, length: int, flow: bool) -> tuple[int, int]:
        norm, hidden = self.model.post_llm.norm, self.model.post_llm.hparams.hidden_size
        dtype = self._dtype(norm)
        kept = kept_by(norm, self.setting, lambda: (fake((count, length, hidden), dtype, self.setting, flow),), _none)
        targets = int((self.batch.labels[:, 1:] != IGNORED).sum())
        head, states = self.model.post_llm.head_weight, flow or trains(norm)
        kept += targets * torch.int64.itemsize * states  # their indices
        loss = targets * hidden * dtype.itemsize * states + head.numel() * 4 * head.requires_grad
        return kept, loss

    def _dtype(self, part: nn.Module) -> torch.dtype:
        """Of what enters a part: the type of the weights, which autocast leaves to the residual stream."""
        return self.setting.weights or next(part.parameters()).dtype

    def _size(self, part: nn.Module) -> int:
        return self._dtype(part).itemsize


def _none(_: Any) -> tuple[Tensor, ...]:
    return ()
