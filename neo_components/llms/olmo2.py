"""OLMo 2: norms behind attention and feed-forward, and over whole queries and keys."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, rope_sizes
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("olmo2")
class Olmo2(Family):
    """Its norms have the placement ``after``."""

    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for an OLMo 2 config."""
        found, bias = block_sizes(config), bool(config.get("attention_bias", False))
        found |= {"norm_placement": "after", "qk_norm": "whole", "qkv_bias": bias, "output_bias": bias}
        return found | rope_sizes(config, found)
