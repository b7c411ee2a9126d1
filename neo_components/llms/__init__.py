"""Language model families: how the sizes in a Hugging Face config and the names of its weights read as a post-LLM.

A family is one file with a :class:`Family` and one line in ``FAMILIES``.
"""

from __future__ import annotations

from typing import Any

from neo_components.llms.family import Family
from neo_components.llms.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN3,)}


def register_family(family: Family) -> Family:
    """Enters a family under its ``model_type``."""
    FAMILIES[family.model_type] = family
    return family


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config belongs to.

    Raises:
        ValueError: if its ``model_type`` is not supported.
    """
    kind = config.get("model_type", config.get("kind"))  # the library's own folders say their kind
    if kind not in FAMILIES:
        raise ValueError(f"language model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


__all__ = ["FAMILIES", "Family", "family_of", "register_family"]
