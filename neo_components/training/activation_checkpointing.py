"""How many blocks have to be computed again so that a step's activations fit: the least share that does."""

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
from neo_components.training.lora import choose_trained
from neo_components.training.optimizers import hidden_matrices
from neo_components.types import Batch

ROOM = 0.9
"""Share of a device's memory that is planned with; its driver and the allocator's gaps take some."""


def settle(
    stage: StageConfig,
    model: NEO,
    data: Mapping[str, Any],
    setting: Setting,
    device_memory: int | None,
    plan: Plan,
    accumulates: bool = False,
) -> StageConfig:
    """The stage with a number for ``recompute``; one that is not ``auto`` is returned as it is.

    The least share of blocks is chosen with which the worst rows fit: full ones, of the longest documents that the data
    allows or of such as take the unfused attention, all of their tokens visual and all of them learnt.

    Args:
        stage: the stage.
        model: what it trains, on any device.
        data: ``rows``, ``seq_len`` and ``max_length`` of the data module.
        setting: device and precision.
        device_memory: bytes of one device, looked at without ``stage.activation_gb``; ``None``: not known.
        plan: how the model is laid over devices.
        accumulates: whether gradients stay from batch to batch.

    Raises:
        ValueError: if it does not fit even with every block computed again, or there is nothing to fit into.
    """
    if stage.recompute != "auto":
        return stage
    choose_trained(model, stage)
    budget = _budget(stage, device_memory)
    kept = [(batch, kept_activations(model, batch, setting)) for batch in worst_rows(model, data, setting.device)]
    stacks: list[PrimitiveStack] = [model.pre_buffer, model.post_llm]
    before = [stack.checkpointed_blocks for stack in stacks]
    need = 0
    try:
        for share in shares(*(len(stack.layers) for stack in stacks)):
            for stack in stacks:
                stack.checkpointed_blocks = blocks_of(share, len(stack.layers))
            need = max(
                _need(stage, model, batch, setting, plan, activations, accumulates) for batch, activations in kept
            )
            if need <= budget:
                return replace(stage, recompute=share, activation_gb=0.0)
    finally:
        for stack, count in zip(stacks, before, strict=True):
            stack.checkpointed_blocks = count
    what = "stage.activation_gb" if stage.activation_gb else f"{ROOM:.0%} of the device's memory"
    raise ValueError(
        f"stage.recompute auto: with every block computed again {need / 1e9:.3g} GB are needed, and {what} is "
        f"{budget / 1e9:.3g} GB; lower data.micro_batch_size or data.seq_len (now {data['micro_batch_size']} of "
        f"{data['seq_len']}), raise stage.activation_gb, or divide the model over more devices"
    )


def _budget(stage: StageConfig, device_memory: int | None) -> float:
    if stage.activation_gb:
        return stage.activation_gb * 1e9
    if device_memory is None:
        raise ValueError("stage.recompute auto: the device's memory is not known; give stage.activation_gb")
    return ROOM * device_memory


def _need(
    stage: StageConfig, model: NEO, batch: Batch, setting: Setting, plan: Plan, activations: Activations,
    accumulates: bool,
) -> int:  # fmt: skip
    """Bytes of the activations; without a budget for them, of everything."""
    again = model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks
    if stage.activation_gb:
        return activations.total(*again) + activations.largest(*again)
    single = hidden_matrices(model) if stage.optimizer == "muon" else ()
    return step_memory(model, batch, setting, plan, activations, single, bool(stage.ema), accumulates).peak


def blocks_of(share: float, depth: int) -> int:
    """How many blocks of a stack a share of them is."""
    return round(share * depth)


def shares(*depths: int) -> list[float]:
    """Shares from 0 to 1 that differ in the number of blocks of some stack, the least first."""
    found: dict[tuple[int, ...], float] = {}
    for step in range(1001):
        share = step / 1000
        found.setdefault(tuple(blocks_of(share, depth) for depth in depths), share)
    return sorted(found.values())


def worst_rows(model: NEO, data: Mapping[str, Any], device: str) -> list[Batch]:
    """Rows that keep the most: of the longest documents, and on a CPU also of the longest whose attention keeps every
    score (``spans.FUSED``)."""
    longest = min(data["seq_len"], data["max_length"] or data["seq_len"])
    lengths = {longest, min(longest, FUSED - 1)} if device == "cpu" else {longest}
    batches = []
    for length in sorted(lengths):
        document = Document(length - 2, 0) if length > 2 else Document(0, length)
        batch = assumed_batch(model, document, data["micro_batch_size"], data["seq_len"])
        batches.append(replace(batch, labels=torch.zeros_like(batch.labels), loss_weights=batch.loss_weights + 1))
    return batches
