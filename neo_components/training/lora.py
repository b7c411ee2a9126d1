"""Low-rank adapters (LoRA) on the blocks of the post-LLM, by the package peft; merged before a model is saved.

Source: Hu et al. 2021 (arXiv 2106.09685): a frozen weight W gets the trainable update ``alpha / rank * B A``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from neo_components.model.neo import NEO
from neo_components.recipe.stage import LoRA, StageConfig
from neo_components.training.groups import train_only

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

ADAPTER = "default"
"""peft's name of the only adapter."""


def add_lora(model: NEO, lora: LoRA) -> None:
    """Adds adapters to linear layers of the post-LLM's blocks. Their update is zero at first.

    Args:
        model: changed in place.
        lora: which layers, and how.

    Raises:
        ModuleNotFoundError: if peft is not installed.
        ValueError: if a target is no linear layer of the blocks.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "stage.lora needs the package peft: run `pip install 'neo-components[lora]'`, or remove stage.lora"
        ) from error
    check_targets(model, lora)
    inject_adapter_in_model(
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type] # peft only divides it by the rank
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
        ),
        model.post_llm.layers,
    )


def set_trainable(model: NEO, stage: StageConfig) -> list[nn.Parameter]:
    """Makes trainable what a stage names and its adapters, which are added if needed; freezes everything else.

    Returns:
        The trainable parameters.

    Raises:
        ModuleNotFoundError: as :func:`add_lora`.
        ValueError: as :func:`add_lora` and ``groups.train_only``.
    """
    if stage.lora is not None and not lora_layers(model):
        add_lora(model, stage.lora)
    return train_only(model, stage.train, lora_parameters(model))


def check_targets(model: NEO, lora: LoRA) -> None:
    """Refuses targets that no block has. Needs neither weights nor peft.

    Raises:
        ValueError: if a target is no linear layer of the blocks.
    """
    blocks = model.post_llm.layers
    new = set(model.post_llm.hw_modules())
    linear = [name for name, part in blocks.named_modules() if isinstance(part, nn.Linear) and part not in new]
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in linear))
    wrong = [target for target in lora.targets if target not in known]
    if wrong:
        raise ValueError(
            f"stage.lora.targets: {', '.join(map(repr, wrong))} names no linear layer of the post-LLM's blocks; they "
            f"have {', '.join(known)} (stage.train: [post_llm.hw] trains the H/W projections without adapters)"
        )


def lora_layers(model: nn.Module) -> list[tuple[nn.Module, str, LoraLinear]]:
    """Every adapted layer, with its parent module and its name in that module."""
    kind = getattr(sys.modules.get("peft.tuners.lora"), "LoraLayer", ())  # without peft there are none
    parents = list(model.modules())
    return [
        (parent, name, part) for parent in parents for name, part in parent.named_children() if isinstance(part, kind)
    ]


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all adapters."""
    return [
        parameter
        for _, _, layer in lora_layers(model)
        for part in (layer.lora_A, layer.lora_B)
        for parameter in part.parameters()
    ]


def adapted_weights(model: nn.Module) -> dict[int, LoraLinear]:
    """``id`` of a frozen weight -> the layer that adapts it."""
    return {id(layer.get_base_layer().weight): layer for _, _, layer in lora_layers(model)}


@torch.no_grad()
def merged_weight(weight: Tensor, layer: LoraLinear) -> Tensor:
    """The weight plus the update of its adapter."""
    return weight + layer.get_delta_weight(ADAPTER)


def merge_lora(model: nn.Module) -> None:
    """Merges the adapters into the weights and removes them; parameters then have the names of a model without LoRA.

    Raises:
        ValueError: if a merged weight would not be finite.
    """
    for parent, name, layer in lora_layers(model):
        layer.merge(safe_merge=True)
        setattr(parent, name, layer.get_base_layer())
    for part in model.modules():
        vars(part).pop("peft_config", None)  # peft leaves it on what it changed
