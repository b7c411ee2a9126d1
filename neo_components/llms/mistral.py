"""Mistral: Llama with a sliding window in every block, if it has one."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, in_model, require, rope_sizes, window_sizes

DEFAULTS = {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072}


def sizes(config: Config) -> Sizes:
    """Keyword arguments of ``PostLLM`` for a Mistral config."""
    config = DEFAULTS | config
    # Blocks of different types are another family (Ministral), which transformers does not read as Mistral either.
    require(config, {"hidden_act": ("silu",), "layer_types": (None,)})
    found = block_sizes(config) | {"qk_norm": "none"}
    return found | rope_sizes(config, found) | window_sizes(config, None, 4096)


MISTRAL = Family("mistral", sizes, in_model)
