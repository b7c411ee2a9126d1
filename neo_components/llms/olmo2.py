"""OLMo 2: norms behind attention and feed-forward, and over whole queries and keys."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, in_model, require, rope_sizes

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}


def sizes(config: Config) -> Sizes:
    """Keyword arguments of ``PostLLM`` for an OLMo 2 config."""
    config = DEFAULTS | config
    require(config, {"hidden_act": ("silu",)})
    found, bias = block_sizes(config), bool(config.get("attention_bias", False))
    found |= {"norm_placement": "after", "qk_norm": "whole", "qkv_bias": bias, "output_bias": bias}
    return found | rope_sizes(config, found)


OLMO2 = Family("olmo2", sizes, in_model)
