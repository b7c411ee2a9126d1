"""SmolLM3: Llama in which every fourth block is a NoPE layer: its T channels are not rotated."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, require, rope_sizes, window_sizes
from neo_components.llms.llama import biases
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("smollm3")
class SmolLM3(Family):
    """A window, where it is switched on, is one of the NoPE layers, unless ``layer_types`` differs."""

    defaults = {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }  # fmt: skip

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a SmolLM3 config."""
        rotated = _rotated(config)
        found = block_sizes(config) | biases(config)
        found |= {"qk_norm": "none", "nope_layers": [number for number, rotates in enumerate(rotated) if not rotates]}
        return found | rope_sizes(config, found, default_base=2e6) | _window(config, rotated)


def _rotated(config: Config) -> list[int]:
    """Per block 1 if its T channels are rotated. The config calls this ``no_rope_layers``."""
    depth, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    rotated = config.get("no_rope_layers")
    if rotated is None:
        return [int((number + 1) % every != 0) for number in range(depth)]
    if len(rotated) < depth:
        raise ValueError(f"no_rope_layers has {len(rotated)} entries for num_hidden_layers={depth}")
    return list(rotated[:depth])


def _window(config: Config, rotated: list[int]) -> Sizes:
    if not config.get("use_sliding_window", False):
        require(config, {"layer_types": (None, ["full_attention"] * config["num_hidden_layers"])})
        return {}
    types = config.get("layer_types")
    if types is None:
        slides = config.get("sliding_window") is not None
        types = ["full_attention" if rotates or not slides else "sliding_attention" for rotates in rotated]
    return window_sizes(config, types, None)
