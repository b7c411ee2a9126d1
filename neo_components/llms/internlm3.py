"""InternLM3: Llama with a head width of its own and biases that ``qkv_bias`` and ``bias`` switch on.

Its files come with code of their own (``modeling_internlm3.py``): ``qkv_bias`` is one of queries, keys and values,
``bias`` one of the attention's output and of the feed-forward.
"""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, in_model, require, rope_sizes

DEFAULTS = {"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}


def sizes(config: Config) -> Sizes:
    """Keyword arguments of ``PostLLM`` for an InternLM3 config."""
    config = DEFAULTS | config
    require(config, {"hidden_act": ("silu",)})
    found, bias = block_sizes(config), bool(config.get("bias", False))
    found |= {
        "qk_norm": "none",
        "qkv_bias": bool(config.get("qkv_bias", False)),
        "output_bias": bias,
        "feed_forward_bias": bias,
    }
    return found | rope_sizes(config, found)


INTERNLM3 = Family("internlm3", sizes, in_model)
