"""What a language model family has to say about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        model_type: as in the config.
        sizes: ``sizes(config)`` -> keyword arguments of ``PostLLM``; raises ValueError, naming the setting, for what
            the family cannot do.
        rename: ``rename(name)``: a post-LLM weight's name -> the name in the family's files.
    """

    model_type: str
    sizes: Callable[[dict[str, Any]], dict[str, Any]]
    rename: Callable[[str], str]


def require(config: dict[str, Any], allowed: dict[str, tuple[Any, ...]]) -> None:
    """Refuses settings that would be computed wrongly.

    Raises:
        ValueError: naming each setting, its value and what is allowed.
    """
    faults = [
        f"{name}={config[name]!r} (supported: {' or '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if faults:
        raise ValueError(f"this {config.get('model_type')} config is not supported: {'; '.join(faults)}")


def rope_base(config: dict[str, Any]) -> float:
    """Base of the rotary frequencies, from either place where configs keep it.

    Raises:
        ValueError: if the frequencies are scaled, or no base is given.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not supported yet")
    base = rope.get("rope_theta", config.get("rope_theta"))
    if base is None:
        raise ValueError("the config gives no rope_theta")
    return float(base)
