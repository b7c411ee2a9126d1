"""SmolLM3: Llama in which the T channels of every fourth block do not turn (NoPE)."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, in_model, require, rope_sizes, window_sizes
from neo_components.llms.llama import biases

DEFAULTS = {
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


def sizes(config: Config) -> Sizes:
    """Keyword arguments of ``PostLLM`` for a SmolLM3 config."""
    config = DEFAULTS | config
    require(config, {"hidden_act": ("silu",)})
    turning = _turning(config)
    found = block_sizes(config) | biases(config)
    found |= {"qk_norm": "none", "nope_layers": [number for number, turns in enumerate(turning) if not turns]}
    return found | rope_sizes(config, found, default_base=2e6) | _window(config, turning)


def _turning(config: Config) -> list[int]:
    """Per block 1 if it turns. The config calls this ``no_rope_layers``."""
    depth, every = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    turning = config.get("no_rope_layers")
    if turning is None:
        return [int((number + 1) % every != 0) for number in range(depth)]
    if len(turning) < depth:
        raise ValueError(f"no_rope_layers has {len(turning)} entries for num_hidden_layers={depth}")
    return list(turning[:depth])


def _window(config: Config, turning: list[int]) -> Sizes:
    """A window, where it is switched on, is one of the blocks that do not turn, unless ``layer_types`` says else."""
    if not config.get("use_sliding_window", False):
        require(config, {"layer_types": (None, ["full_attention"] * config["num_hidden_layers"])})
        return {}
    types = config.get("layer_types")
    if types is None:
        slides = config.get("sliding_window") is not None
        types = ["full_attention" if turns or not slides else "sliding_attention" for turns in turning]
    return window_sizes(config, types, None)


SMOLLM3 = Family("smollm3", sizes, in_model)
