"""Resolves ``stage.activation_checkpointing: auto``: the smallest fraction of checkpointed blocks that fits memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from neo_components.components.document_attention import FUSED
from neo_components.components.stack import PrimitiveStack
from neo_components.estimate.activations import Activations, kept_activations
from neo_components.estimate.assumed import Document, assumed_batch
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import Setting
from neo_components.model.neo import NEO
from neo_components.recipe.stage import StageConfig
from neo_components.training.lora import set_trainable
from neo_components.training.optimizers import hidden_matrices
from neo_components.types import Batch

ROOM = 0.9
"""Fraction of a device's memory to plan with; the driver and fragmentation take the rest."""


def resolve_auto(
    stage: StageConfig,
    model: NEO,
    data: Mapping[str, Any],
    setting: Setting,
    device_memory: int | None,
    plan: Plan,
    accumulates: bool = False,
) -> StageConfig:
    """The stage with a number for ``activation_checkpointing``; a stage that has one is returned unchanged.

    The smallest fraction of blocks is chosen with which the worst micro-batches fit: full, of the longest documents
    that the data allows (and of the longest ones that take the unfused attention), with visual tokens wherever possible
    and every token a target.

    Args:
        stage: the stage.
        model: the model that it trains, on any device.
        data: ``micro_batch_size``, ``seq_len`` and ``max_length`` of the data module.
        setting: device and precision.
        device_memory: bytes of one device, used without ``stage.activation_gb``; ``None``: unknown.
        plan: how the model is placed on devices.
        accumulates: whether gradients are kept from micro-batch to micro-batch.

    Raises:
        ValueError: if it does not fit even with every block checkpointed, or the memory is unknown.
    """
    if stage.activation_checkpointing != "auto":
        return stage
    set_trainable(model, stage)
    budget = _budget(stage, device_memory)
    stacks: list[PrimitiveStack] = [model.pre_buffer, model.post_llm]
    before = [(stack.checkpointed_blocks, stack.checkpoint_keeps) for stack in stacks]
    for stack in stacks:
        stack.checkpoint_keeps = stage.checkpoint_keeps
    kept = [(batch, kept_activations(model, batch, setting)) for batch in worst_batches(model, data, setting.device)]
    need = 0
    try:
        for fraction in fractions(*(len(stack.layers) for stack in stacks)):
            for stack in stacks:
                stack.checkpointed_blocks = blocks_of(fraction, len(stack.layers))
            need = max(
                _need(stage, model, batch, setting, plan, activations, accumulates) for batch, activations in kept
            )
            if need <= budget:
                keeps = stage.checkpoint_keeps if fraction else "input"  # it would have no effect
                return replace(stage, activation_checkpointing=fraction, activation_gb=0.0, checkpoint_keeps=keeps)
    finally:
        for stack, (count, kept_before) in zip(stacks, before, strict=True):
            stack.checkpointed_blocks, stack.checkpoint_keeps = count, kept_before
    limit = "stage.activation_gb" if stage.activation_gb else f"{ROOM:.0%} of the device's memory"
    raise ValueError(
        f"stage.activation_checkpointing auto: with every block checkpointed {need / 1e9:.3g} GB are needed, and "
        f"{limit} is {budget / 1e9:.3g} GB; lower data.micro_batch_size or data.seq_len (now "
        f"{data['micro_batch_size']} of {data['seq_len']}), raise stage.activation_gb, or shard the model over "
        "more devices"
    )


def _budget(stage: StageConfig, device_memory: int | None) -> float:
    if stage.activation_gb:
        return stage.activation_gb * 1e9
    if device_memory is None:
        raise ValueError(
            "stage.activation_checkpointing auto: the device's memory is not known; set stage.activation_gb"
        )
    return ROOM * device_memory


def _need(
    stage: StageConfig, model: NEO, batch: Batch, setting: Setting, plan: Plan, activations: Activations,
    accumulates: bool,
) -> int:  # fmt: skip
    """Bytes of the activations; without a budget for them, of everything."""
    checkpointed = model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks
    if stage.activation_gb:
        activations = activations.on_each_of(plan.context_parallel)
        return activations.total(*checkpointed) + activations.largest(*checkpointed)
    single = hidden_matrices(model) if stage.optimizer == "muon" else ()
    offloads = stage.offload == "optimizer"
    return step_memory(model, batch, setting, plan, activations, single, bool(stage.ema), accumulates, offloads).peak


def blocks_of(fraction: float, depth: int) -> int:
    """Number of checkpointed blocks of a stack of ``depth`` blocks."""
    return round(fraction * depth)


def fractions(*depths: int) -> list[float]:
    """Fractions from 0 to 1 that differ in the number of blocks of some stack, in ascending order."""
    found: dict[tuple[int, ...], float] = {}
    for step in range(1001):
        fraction = step / 1000
        found.setdefault(tuple(blocks_of(fraction, depth) for depth in depths), fraction)
    return sorted(found.values())


def worst_batches(model: NEO, data: Mapping[str, Any], device: str) -> list[Batch]:
    """Micro-batches with the most activations: of the longest documents and, on a CPU, also of the longest documents
    whose attention stores every score (``document_attention.FUSED``)."""
    longest = min(data["seq_len"], data["max_length"] or data["seq_len"])
    lengths = {longest, min(longest, FUSED - 1)} if device == "cpu" else {longest}
    batches = []
    for length in sorted(lengths):
        document = Document.of_length(length, model.input_spec)
        document = document if document.visual else Document(0, length)
        batch = assumed_batch(model, document, data["micro_batch_size"], data["seq_len"])
        batches.append(replace(batch, labels=torch.zeros_like(batch.labels), loss_weights=batch.loss_weights + 1))
    return batches
