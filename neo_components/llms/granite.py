"""Granite 3.x, dense: Llama with a factor on embeddings, residuals, scores and logits."""

from __future__ import annotations

from neo_components.llms.family import Config, Sizes
from neo_components.llms.llama import Llama
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("granite")
class Granite(Llama):
    """Each factor has its own name in the config."""

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Granite config."""
        return super().sizes(config) | {
            "attention_scale": float(config.get("attention_multiplier", 1.0)),
            "residual_multiplier": float(config.get("residual_multiplier", 1.0)),
            "embedding_multiplier": float(config.get("embedding_multiplier", 1.0)),
            "logits_divisor": float(config.get("logits_scaling", 1.0)),
        }
