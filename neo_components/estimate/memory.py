"""Memory of one device by kind, for a step of one process, data-parallel or sharded."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from neo_components.components.moe import SparseFeedForward
from neo_components.components.primitive import NativePrimitive
from neo_components.components.token_loss import chunk_size
from neo_components.estimate.activations import Activations
from neo_components.estimate.tracing import Setting
from neo_components.model.neo import NEO
from neo_components.types import Batch

STRATEGIES = ("single", "ddp", "fsdp2")


@dataclass(frozen=True)
class Plan:
    """How a model is distributed over devices.

    Args:
        strategy: ``single``; ``ddp``: every device holds everything; ``fsdp2``: weights, gradients and optimizer states
            are sharded over the devices and gathered block by block.
        devices: all of them; each group of ``context_parallel`` devices reads its own packed sequences.
        context_parallel: how many devices compute each packed sequence together.

    Raises:
        ValueError: if the combination is not possible.
    """

    strategy: str = "single"
    devices: int = 1
    context_parallel: int = 1

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.devices < 1:
            raise ValueError(f"devices must be 1 or more, got {self.devices}")
        if self.strategy == "single" and self.devices != 1:
            raise ValueError(f"strategy single has one device, got {self.devices}; choose ddp or fsdp2")
        if self.context_parallel < 1 or self.devices % self.context_parallel:
            raise ValueError(
                f"context_parallel must be 1 or more and divide devices ({self.devices}), got {self.context_parallel}"
            )

    @property
    def groups(self) -> int:
        """How many packed sequences are read at the same time, for each of a micro-batch."""
        return self.devices // self.context_parallel

    @property
    def shards(self) -> int:
        """Into how many shards weights, gradients and states are split."""
        return self.devices if self.strategy == "fsdp2" else 1


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Args:
        kinds: what each kind takes at its own peak; all are there at once only where gradients stay between batches.
        peak: of all together: a block's gradients come when its activations go.
    """

    kinds: dict[str, int]
    peak: int


def step_memory(
    model: NEO,
    batch: Batch,
    setting: Setting,
    plan: Plan,
    activations: Activations,
    single_moment: Collection[Tensor] = (),
    average: bool = False,
    accumulates: bool = False,
    offloads: bool = False,
) -> Memory:
    """Bytes on one device in a training step.

    Weights, gradients, states and activations are those of the code as it stands; working space is a rule of thumb: the
    gradients inside one feed-forward. What a GPU's driver and its allocator take comes on top, one or two GB.

    Args:
        model: what trains is read off ``requires_grad``, what is checkpointed off ``checkpointed_blocks``.
        batch: packed sequences of one device, or of one group of devices under context parallelism.
        setting: device and precision.
        plan: how the model is distributed over devices.
        activations: of the model, batch and setting (``kept_activations``).
        single_moment: weights whose optimizer keeps one number each (Muon); the others are AdamW's, which keeps two.
        average: whether an average of the weights is kept.
        accumulates: whether gradients stay from batch to batch.
        offloads: whether the optimizer's state is on the device for one weight at a time.
    """
    activations = activations.on_each_of(plan.context_parallel)
    single = {id(weight) for weight in single_moment}
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    # What FSDP keeps sharded has the model's own type, and what it gathers the setting's.
    kept = replace(setting, weights=None) if plan.strategy == "fsdp2" else setting
    gradients = _bytes(trained, kept)
    each = [_bytes([p], kept) * (1 if id(p) in single else 2) for p in trained]
    states = max(each, default=0) if offloads else sum(each)
    again = model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks
    always = {
        "weights": _bytes(parameters, kept) // plan.shards,
        "optimizer states": states // plan.shards,
        "average of weights": _bytes(parameters, kept) // plan.shards if average else 0,
        "gradient buckets": gradients if plan.strategy == "ddp" else 0,
        "gathered parts": _gathered(model, setting) if plan.strategy == "fsdp2" else 0,
        "batch": sum(t.nbytes for t in vars(batch).values() if isinstance(t, Tensor)),
    }
    passing = {
        "gradients": gradients // plan.shards,
        "activations": activations.total(*again),
        "one checkpointed block": activations.largest(*again),
        "autocast copies": _autocast_copies(model, setting),
        "logits of one chunk": _chunk(model, batch, setting),
        "working space": _working(model, batch, setting) // plan.context_parallel,
    }
    moving = _peak_of_backward(model, kept, plan, activations, passing, accumulates)
    kinds = {kind: size for kind, size in (always | passing).items() if size}
    return Memory(kinds, sum(always.values()) + moving)


def _peak_of_backward(
    model: NEO, kept: Setting, plan: Plan, activations: Activations, passing: dict[str, int], accumulates: bool
) -> int:
    """The most that activations, gradients and what comes and goes take together, from the loss back to the pixels."""
    stacks = ((model.pre_buffer, activations.pre_buffer), (model.post_llm, activations.post_llm))
    left = passing["activations"]
    made = passing["gradients"] if accumulates else 0
    most = left + made + max(passing["logits of one chunk"], passing["autocast copies"])
    for stack, blocks in reversed(stacks):
        for number in reversed(range(len(blocks))):
            again = number < stack.checkpointed_blocks
            inside = blocks[number].full if again else 0
            most = max(most, left + made + inside + passing["working space"])
            left -= blocks[number].input if again else blocks[number].full
            if not accumulates:
                trained = [p for p in stack.layers[number].parameters() if p.requires_grad]
                made += _bytes(trained, kept) // plan.shards
    return max(most, passing["gradients"])


def _bytes(parameters: list[nn.Parameter], setting: Setting) -> int:
    return sum(p.numel() * (setting.weights or p.dtype).itemsize for p in parameters)


def _gathered(model: NEO, setting: Setting) -> int:
    """Two gathered blocks, the present and the next one (or a larger embedding), and the parameters outside of blocks;
    and of the largest of them the gradient before it is sharded, once as computed and once in float32 for the sum.

    The parts are those of ``training.fsdp2.strategy.shard``."""
    blocks = [list(block.parameters()) for stack in (model.pre_buffer, model.post_llm) for block in stack.layers]
    alone = [model.patch_embedding, *([model.post_llm.word_embedding] if model.post_llm.lm_head is not None else [])]
    single = [list(part.parameters()) for part in alone]
    inside = {id(p) for part in (*blocks, *single) for p in part}
    rest = [p for p in model.parameters() if id(p) not in inside]
    trained = [[p for p in part if p.requires_grad] for part in (*blocks, *single, rest)]
    gradient = max(_bytes(part, setting) + 4 * sum(p.numel() for p in part) for part in trained)
    together = max([2 * _bytes(block, setting) for block in blocks] + [_bytes(part, setting) for part in single])
    return together + _bytes(rest, setting) + gradient


def _autocast_copies(model: NEO, setting: Setting) -> int:
    """Autocast keeps its copies of the weights that train until the forward pass ends, also those of blocks that keep
    nothing else; of the other blocks they count as activations."""
    if setting.autocast is None:
        return 0
    stacks = (model.pre_buffer, model.post_llm)
    blocks = [block for stack in stacks for block in list(stack.layers)[: stack.checkpointed_blocks]]
    weights = [p for block in blocks for p in block.parameters() if p.requires_grad and p.ndim > 1]
    return sum(p.numel() for p in weights) * setting.autocast.itemsize


def _chunk(model: NEO, batch: Batch, setting: Setting) -> int:
    """Logits in float32, which become their gradients in place, and these once more in a half-precision compute type;
    under autocast a copy of the head; and, if the head trains, its gradient from one chunk."""
    weight = model.post_llm.head_weight
    size = (setting.autocast or setting.weights or weight.dtype).itemsize
    targets = min(chunk_size(len(weight), torch.device(setting.device)), int((batch.loss_weights > 0).sum()))
    logits = targets * len(weight) * (4 if size == 4 else 4 + size)
    return logits + weight.numel() * (size * weight.requires_grad + size * (setting.autocast is not None))


def _working(model: NEO, batch: Batch, setting: Setting) -> int:
    """Gradients of the three wide tensors of the widest feed-forward, and of its input and output."""
    widest = 0
    for stack in (model.pre_buffer, model.post_llm):
        for block in stack.layers:
            assert isinstance(block, NativePrimitive)
            h = block.hparams
            times = h.experts_per_token if isinstance(block.mlp, SparseFeedForward) else 1
            widest = max(widest, 3 * times * h.feed_forward_size + 2 * h.hidden_size)
    dtype = setting.autocast or setting.weights or model.post_llm.norm.weight.dtype
    return widest * batch.token_ids.numel() * dtype.itemsize
