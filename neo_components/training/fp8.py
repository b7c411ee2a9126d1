"""Linear layers in FP8 by torchao: ``stage.fp8``.

Products of the forward and backward pass multiply float8 numbers, scaled by the largest of each tensor, and add up in
float32 (Micikevicius et al. 2022, arXiv 2209.05433); weights, gradients and optimizer states keep their types.

Converted are the linear layers that a language model's block brings along, if they train and both widths are multiples
of 16, which the products demand. Not converted: the head and the word embedding, whose errors reach the loss directly;
H/W projections, whose keys start at zero; norms, routers, experts, bridges and the patch embedding. A frozen layer is
left as it is, since torchao's backward pass would compute the gradient of its weight.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from neo_components.model.neo import NEO
from neo_components.recipe.stage import LINEAR, StageConfig

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 9)
"""Compute capability of the first GPUs that multiply float8 numbers."""


def use_fp8(model: NEO, stage: StageConfig) -> int:
    """Converts the layers of a model in place; names of weights stay. Returns how many.

    Raises:
        ValueError: if torchao is missing, the GPU has no FP8, or no layer can be converted.
    """
    if stage.fp8 == "none":
        return 0
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"stage.fp8: {stage.fp8}: the package torchao is not installed: pip install torchao")
    if stage.fp8 == "linears" and (problem := _missing_device()):
        raise ValueError(f"stage.fp8: linears: {problem}; use none, or emulated to see the effect on the loss")
    torchao: Any = importlib.import_module("torchao.float8")
    # The gradient of a weight sums over tokens, whose number need not be a multiple of 16.
    config = torchao.Float8LinearConfig(emulate=stage.fp8 == "emulated", pad_inner_dim=True)
    count = 0
    for block in (*model.pre_buffer.blocks, *model.post_llm.blocks):
        chosen = {id(part) for part in block.modules() if convertible(part)} & _language_linears(block)
        count += len(chosen)
        torchao.convert_to_float8_training(
            block, module_filter_fn=lambda part, name, chosen=chosen: id(part) in chosen, config=config
        )
    if not count:
        raise ValueError(
            f"stage.fp8: {stage.fp8}: no linear layer of a block trains and has widths that 16 divides; use none"
        )
    log.info("stage.fp8: %d linear layers in float8%s", count, ", emulated" if stage.fp8 == "emulated" else "")
    return count


def without_fp8(model: NEO) -> None:
    """Makes converted layers plain ones again; their weights are as they were."""
    for part in model.modules():
        if type(part).__name__ == "Float8Linear" and isinstance(part, nn.Linear):
            part.__class__ = nn.Linear


def convertible(part: nn.Module) -> bool:
    """Whether a module is a plain linear layer that trains, of widths that FP8 products take."""
    if type(part) is not nn.Linear or part.in_features % 16 or part.out_features % 16:
        return False
    return part.weight.requires_grad


def _language_linears(block: nn.Module) -> set[int]:
    """Ids of the layers that have a language model's names in a block: attention and feed-forwards."""
    return {id(part) for name, part in block.named_modules() if name.split(".")[-1] in LINEAR}


def _missing_device() -> str:
    """Why there is no GPU with FP8; empty if there is one."""
    if not torch.cuda.is_available():
        return "its products need a GPU, and there is none here"
    if (capability := torch.cuda.get_device_capability()) < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, 8.9 or more is needed"
    return ""
