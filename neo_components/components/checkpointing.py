"""What a checkpointed block keeps for the backward pass: its input alone, or the results of its matrix products too.

Everything that is not kept is recomputed. Products and fused attention are the expensive part of a block, so with them
kept the recomputation is that of norms, rotations and gates (selective activation checkpointing; Korthikanti et al.
2022, arXiv 2205.05198; ``torch.utils.checkpoint.create_selective_checkpoint_contexts``).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from neo_components.components.block_inputs import BlockInputs
from neo_components.components.moe import SparseFeedForward

KEEPS = ("input", "products")
"""What checkpointed blocks may keep."""

PRODUCTS = (
    "aten.mm", "aten.addmm", "aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention", "aten._scaled_dot_product_flash_attention_for_cpu",
    "torch_attn._varlen_attn",
)  # fmt: skip
"""Operators whose results are kept. The attention of ``sdpa`` in float32 on a CPU and of FlexAttention is none of them:
it is recomputed."""


def checkpointed(block: nn.Module, x: Tensor, inputs: BlockInputs, keeps: str) -> Tensor:
    """``block(x, inputs)``, of which only the input, or also the products, are kept for the backward pass."""
    if keeps == "input":
        return checkpoint(block, x, inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(block, x, inputs, use_reentrant=False, context_fn=contexts)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_product(operator) else CheckpointPolicy.PREFER_RECOMPUTE


@lru_cache(maxsize=1024)
def _is_product(operator: Any) -> bool:
    return isinstance(operator, torch._ops.OpOverload) and str(operator.overloadpacket) in PRODUCTS


def products_of(block: nn.Module, tokens: int) -> int:
    """How many numbers the results of a block's matrix products have for ``tokens`` tokens; attention is left out."""
    total = 0
    for part in block.modules():
        if isinstance(part, nn.Linear):
            total += tokens * part.out_features
        elif isinstance(part, SparseFeedForward):
            first, second = part.experts.gate_up_proj, part.experts.down_proj
            total += tokens * part.experts_per_token * (first.shape[1] + second.shape[1])
    return total
