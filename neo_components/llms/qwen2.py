"""Qwen2 and Qwen2.5: biases on queries, keys and values, no norms on them."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, rope_sizes, window_sizes
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("qwen2")
class Qwen2(Family):
    """Blocks from ``max_window_layers`` on may have a window."""

    defaults = {"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Qwen2 config."""
        found = block_sizes(config) | {"qk_norm": "none", "qkv_bias": True}
        return found | rope_sizes(config, found) | window_sizes(config, layer_types(config), 4096)


def layer_types(config: Config) -> list[str]:
    """The type of each block of a Qwen config: those from ``max_window_layers`` on slide, if any may.

    Raises:
        ValueError: if blocks are to slide though the window is switched off.
    """
    on, depth = bool(config.get("use_sliding_window", False)), config["num_hidden_layers"]
    if config.get("layer_types") is not None:
        if not on and "sliding_attention" in config["layer_types"]:
            raise ValueError("layer_types has sliding_attention, but use_sliding_window is off; set one of the two")
        return list(config["layer_types"])
    first = config.get("max_window_layers", 28)
    slides = on and config.get("sliding_window", 4096) is not None
    return ["sliding_attention" if slides and number >= first else "full_attention" for number in range(depth)]
