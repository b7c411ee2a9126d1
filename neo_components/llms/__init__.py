"""Language model families: how the sizes in a Hugging Face config and the names of its weights read as a post-LLM.

A family is one file with a :class:`Family` and one line in ``FAMILIES``.
"""

from __future__ import annotations

from pathlib import Path

from neo_components.llms.family import Config, Family, Group, Sizes
from neo_components.llms.gemma3 import GEMMA3, GEMMA3_TEXT
from neo_components.llms.granite import GRANITE
from neo_components.llms.internlm2 import INTERNLM2
from neo_components.llms.internlm3 import INTERNLM3
from neo_components.llms.llama import LLAMA
from neo_components.llms.mistral import MISTRAL
from neo_components.llms.olmo2 import OLMO2
from neo_components.llms.phi3 import PHI3
from neo_components.llms.qwen2 import QWEN2
from neo_components.llms.qwen3 import QWEN3
from neo_components.llms.qwen3_moe import QWEN3_MOE
from neo_components.llms.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        GEMMA3,
        GEMMA3_TEXT,
        GRANITE,
        INTERNLM2,
        INTERNLM3,
        LLAMA,
        MISTRAL,
        OLMO2,
        PHI3,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        SMOLLM3,
    )
}


def register_family(family: Family) -> Family:
    """Enters a family under its ``model_type``."""
    FAMILIES[family.model_type] = family
    return family


def family_of(config: Config) -> Family:
    """The family that a config belongs to.

    Raises:
        ValueError: if its ``model_type`` is not supported.
    """
    kind = config.get("model_type", config.get("kind"))  # the library's own folders say their kind
    if kind not in FAMILIES:
        raise ValueError(f"language model type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def arguments_of(family: Family, config: Config, folder: Path) -> Sizes:
    """Keyword arguments of ``PostLLM`` for a config.

    Args:
        family: the config's.
        config: the config.
        folder: where it lies, for messages.

    Raises:
        ValueError: if the config lacks a size, is a quantised model's, or asks for what the family cannot do.
    """
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{folder} holds weights quantised by {method!r}, which cannot be trained; give the folder of the "
            "unquantised model"
        )
    try:
        return family.sizes(config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error} of a {family.model_type} model") from error


__all__ = ["FAMILIES", "Family", "Group", "arguments_of", "family_of", "register_family"]
