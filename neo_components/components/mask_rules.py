"""The mask rules that ship. A rule states, elementwise, whether a query attends to a key; ``masks.py`` renders it.

A rule's parameters behind ``query`` and ``key`` are its options.
"""

from __future__ import annotations

from torch import Tensor

from neo_components.components.masks import Tokens
from neo_components.registry import MASKS


@MASKS.register("mixed")
def mixed(query: Tokens, key: Tokens) -> Tensor:
    """Same document, and the key not later or both tokens of the same image (NEO paper section 3.1).

    ``<img>`` and ``</img>`` are ordinary causal tokens.
    """
    same_image = query.inside & key.inside & (query.image == key.image)
    return (query.document == key.document) & ((query.position >= key.position) | same_image)


@MASKS.register("causal")
def causal(query: Tokens, key: Tokens) -> Tensor:
    """Same document and the key not later."""
    return (query.document == key.document) & (query.position >= key.position)


# Both are causal except inside an image, where so many pairs of n tokens attend to each other: with these numbers the
# FLOP estimate does not have to evaluate every pair.
mixed.pairs_inside = lambda n: n * n
causal.pairs_inside = lambda n: n * (n + 1) // 2
