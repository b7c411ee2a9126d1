"""Expert routing by modality: layers of a block of which visual tokens have their own copy.

A routing is a function of a built block. It replaces layers by layers that route, and returns what it added. Linear
layers that it adds start like the block's own, any other layer with weights by its own ``reset_parameters()``.
Attention and feed-forward are called with the block's :class:`~neo_components.components.block_inputs.BlockInputs`,
which know the kind of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from neo_components.registry import EXPERTS
from neo_components.token_indices import sent

if TYPE_CHECKING:
    from neo_components.components.primitive import NativePrimitive

Added = list[tuple[nn.Module, nn.Module]]
"""Modules that a routing added, each with the module whose weights it starts from when a language model is read."""


@EXPERTS.register("none")
def none(block: NativePrimitive) -> Added:
    """All tokens share all layers (NEO)."""
    return []


def route(
    x: Tensor, chosen: Tensor, of_chosen: Callable[[Tensor], Tensor], of_rest: Callable[[Tensor], Tensor]
) -> Tensor:
    """Two layers, each over its own tokens only: nothing is computed twice and masked.

    Args:
        x: [B, L, D].
        chosen: [B, L] bool, the tokens of the first layer. Best on the CPU (``inputs.on_cpu``): a device is asked how
            many they are, and the CPU waits for its answer.
        of_chosen: [n, D] -> [n, any width].
        of_rest: the same for all other tokens.

    Returns:
        [B, L, that width].
    """
    mask, tokens = chosen.flatten().numpy(force=True), x.flatten(0, 1)
    ones, others = (sent(torch.from_numpy(np.flatnonzero(m)), x.device) for m in (mask, ~mask))
    first, second = of_chosen(tokens.index_select(0, ones)), of_rest(tokens.index_select(0, others))
    out = first.new_empty(len(tokens), first.shape[-1]).index_copy(0, ones, first).index_copy(0, others, second)
    return out.unflatten(0, x.shape[:-1])


@torch.no_grad()
def start_from(added: Added) -> None:
    """Sets the weights of added modules to those of the modules that they were added to."""
    for new, old in added:
        theirs = dict(old.named_parameters())
        for name, parameter in new.named_parameters():
            parameter.copy_(theirs[name])
