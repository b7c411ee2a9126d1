"""Qwen3, dense: norms over each query and key head."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, rope_sizes, window_sizes
from neo_components.llms.qwen2 import layer_types
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("qwen3")
class Qwen3(Family):
    """The family that NEO starts from: the defaults of ``PostLLM`` are its own."""

    defaults = {"head_dim": 128, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Qwen3 config."""
        found, bias = block_sizes(config), bool(config.get("attention_bias", False))
        found |= {"qkv_bias": bias, "output_bias": bias}
        return found | rope_sizes(config, found) | window_sizes(config, layer_types(config), 4096)
