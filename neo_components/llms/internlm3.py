"""InternLM3: Llama with its own head width and biases that ``qkv_bias`` and ``bias`` switch on.

Its files come with their own code (``modeling_internlm3.py``): ``qkv_bias`` is one of queries, keys and values,
``bias`` one of the attention's output and of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Iterator

from neo_components.llms.family import Config, Family, Sizes, block_sizes, rope_sizes
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("internlm3")
class InternLM3(Family):
    """No norms on queries and keys."""

    defaults = {"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for an InternLM3 config."""
        found, bias = block_sizes(config), bool(config.get("bias", False))
        found |= {
            "qk_norm": "none",
            "qkv_bias": bool(config.get("qkv_bias", False)),
            "output_bias": bias,
            "feed_forward_bias": bias,
        }
        return found | rope_sizes(config, found)

    def transformers_configs(self, config: Config) -> Iterator[Config]:
        """transformers has no InternLM3 of its own; with all biases or none it is a Llama."""
        yield config
        biases = {"attention_bias": config.get("qkv_bias", False), "mlp_bias": config.get("bias", False)}
        kept = {name: value for name, value in config.items() if name not in ("auto_map", "bias", "qkv_bias")}
        yield kept | biases | {"model_type": "llama"}
