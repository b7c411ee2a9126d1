"""Llama 3.x and what has its shape: Llama 2, SmolLM2, TinyLlama, the Llama distillations of DeepSeek-R1."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, rope_sizes
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("llama")
class Llama(Family):
    """No norms on queries and keys; biases if the config asks for them."""

    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Llama config."""
        found = block_sizes(config)
        return found | biases(config) | {"qk_norm": "none"} | rope_sizes(config, found)


def biases(config: Config) -> Sizes:
    """``attention_bias`` is one of all four projections of the attention, ``mlp_bias`` of the feed-forward's three."""
    attention = bool(config.get("attention_bias", False))
    return {
        "qkv_bias": attention,
        "output_bias": attention,
        "feed_forward_bias": bool(config.get("mlp_bias", False)),
    }
