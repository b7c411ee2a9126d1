"""Qwen3, dense: norms over each query and key head."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, in_model, require, rope_sizes, window_sizes
from neo_components.llms.qwen2 import sliding_types

DEFAULTS = {"head_dim": 128, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}


def sizes(config: Config) -> Sizes:
    """Keyword arguments of ``PostLLM`` for a Qwen3 config."""
    config = DEFAULTS | config
    require(config, {"hidden_act": ("silu",)})
    found = block_sizes(config)
    bias = bool(config.get("attention_bias", False))
    found |= {"qkv_bias": bias, "output_bias": bias}
    return found | rope_sizes(config, found) | window_sizes(config, sliding_types(config), 4096)


QWEN3 = Family("qwen3", sizes, in_model)
