"""Qwen3, dense: grouped-query attention with per-head query and key norms, SwiGLU, no biases."""

from __future__ import annotations

from typing import Any

from neo_components.llms.family import Family, require, rope_base

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "use_sliding_window": (False,),
}


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``PostLLM`` for a Qwen3 config."""
    require(config, SUPPORTED)
    heads = config["num_attention_heads"]
    return {
        "vocab_size": config["vocab_size"],
        "depth": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": config.get("head_dim") or config["hidden_size"] // heads,
        "feed_forward_size": config["intermediate_size"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "base_t": rope_base(config),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def rename(name: str) -> str:
    """A post-LLM weight's name -> Qwen3's; blocks and their parts have the same names."""
    if name == "lm_head.weight":
        return name
    return "model." + name.replace("word_embedding.", "embed_tokens.", 1)


QWEN3 = Family("qwen3", sizes, rename)
