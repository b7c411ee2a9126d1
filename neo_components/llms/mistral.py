"""Mistral: Llama with a sliding window in every block, if it has one."""

from __future__ import annotations

from neo_components.llms.family import Config, Family, Sizes, block_sizes, rope_sizes, window_sizes
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("mistral")
class Mistral(Family):
    """Blocks of different types are another family (Ministral), which transformers does not read as Mistral either."""

    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "max_position_embeddings": 131072}
    supported = {"hidden_act": ("silu",), "layer_types": (None,)}

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Mistral config."""
        found = block_sizes(config) | {"qk_norm": "none"}
        return found | rope_sizes(config, found) | window_sizes(config, None, 4096)
