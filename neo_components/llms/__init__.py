"""Language model families: how a Hugging Face config and the names of its weights are read as a post-LLM.

A family is one file with a :class:`Family` that registers itself under its ``model_type``; nothing lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neo_components.errors import nearest
from neo_components.llms.family import Config, Family, Group, Sizes
from neo_components.registry import LLM_FAMILIES


def family_of(config: Config) -> Family:
    """The family of a config.

    Raises:
        ValueError: if no family of its ``model_type`` is registered; proposes the nearest.
    """
    kind: Any = config.get("model_type", config.get("kind"))  # the library's own folders have a kind
    family: Family = LLM_FAMILIES[kind]()
    return family


def arguments_of(config: Config, folder: Path, parameters: Mapping[str, inspect.Parameter]) -> Sizes:
    """Keyword arguments of ``PostLLM`` for a config.

    Args:
        config: the config.
        folder: its folder, for messages.
        parameters: those of ``PostLLM``, which the family must fit.

    Raises:
        ValueError: if the family is unknown; if the config lacks a size, is of a quantized model, or has a setting that
            the family cannot compute; or if the family gives an argument that ``PostLLM`` does not have, or misses one.
    """
    family = family_of(config)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{folder} holds weights quantized by {method!r}, which cannot be trained; give the folder of the "
            "unquantized model"
        )
    try:
        sizes = family.arguments(config)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error} of a {config.get('model_type')} model") from error
    _check_arguments(family, sizes, parameters)
    return sizes


def _check_arguments(family: Family, sizes: Sizes, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Names what a family's ``sizes`` gives too much or too little."""
    name = f"{type(family).__module__}.{type(family).__qualname__}.sizes"
    for argument in sizes:
        if argument not in parameters:
            raise ValueError(f"{name} gives {argument!r}, which PostLLM does not have{nearest(argument, parameters)}")
    needed = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in sizes]
    if needed:
        raise ValueError(f"{name} does not give {', '.join(map(repr, needed))}, which PostLLM needs")


__all__ = ["Family", "Group", "arguments_of", "family_of"]
