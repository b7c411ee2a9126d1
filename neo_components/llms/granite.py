"""Granite 3.x, dense: Llama with a factor on embeddings, residuals, scores and logits."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, in_model, require, rope_sizes
from neo_components.llms.llama import biases

DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048}


def sizes(config: Config) -> Sizes:
    """Keyword arguments of ``PostLLM`` for a Granite config."""
    config = DEFAULTS | config
    require(config, {"hidden_act": ("silu",)})
    found = block_sizes(config) | biases(config)
    found |= {
        "qk_norm": "none",
        "attention_scale": float(config.get("attention_multiplier", 1.0)),
        "residual_multiplier": float(config.get("residual_multiplier", 1.0)),
        "embedding_multiplier": float(config.get("embedding_multiplier", 1.0)),
        "logits_divisor": float(config.get("logits_scaling", 1.0)),
    }
    return found | rope_sizes(config, found)


GRANITE = Family("granite", sizes, in_model)
