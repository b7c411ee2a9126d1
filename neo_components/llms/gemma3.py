"""Gemma 3, its text part: four norms a block with gain 1 + weight, GeGLU, a separate RoPE base in blocks with a window.

``gemma3_text`` is a text model; ``gemma3`` a vision-language model, of which the language model is taken.
"""

from __future__ import annotations

from collections.abc import Iterator

from neo_components.llms.family import (
    Config,
    Family,
    Sizes,
    block_sizes,
    in_model,
    is_rotary_table,
    require,
    rope_sizes,
    window_sizes,
)
from neo_components.registry import LLM_FAMILIES


@LLM_FAMILIES.register("gemma3_text")
class Gemma3Text(Family):
    """A text model, or the language model inside a vision-language model."""

    defaults = {
        "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "tie_word_embeddings": True,
    }  # fmt: skip
    supported = {
        "hidden_activation": ("gelu_pytorch_tanh",),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Gemma 3 text config."""
        bias = bool(config.get("attention_bias", False))
        found = block_sizes(config) | {
            "norm": "one_plus_weight",
            "norm_placement": "both",
            "activation": "gelu_tanh",
            "qkv_bias": bias,
            "output_bias": bias,
            "attention_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
            "embedding_multiplier": float(config["hidden_size"]) ** 0.5,
        }
        return found | _ropes(config, found) | window_sizes(config, _types(config), 4096)


@LLM_FAMILIES.register("gemma3")
class Gemma3(Gemma3Text):
    """A vision-language model, of which the language model is taken."""

    nested = {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    """What a nested ``text_config`` leaves out if it is the config class's default."""

    def arguments(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for the language model inside a vision-language config."""
        return super().arguments(self.nested | _text_config(config) | {"model_type": "gemma3"})

    def rename(self, name: str) -> tuple[str, ...]:
        """A post-LLM weight's name -> its names in the two layouts of vision-language files."""
        inner = in_model(name)
        if name == "lm_head.weight":
            return (f"language_model.{inner}", inner)
        return (f"language_model.{inner}", inner.replace("model.", "model.language_model.", 1))

    def superfluous(self, name: str) -> bool:
        """Whether a stored tensor belongs to the vision encoder or its projector."""
        vision = ("vision_tower.", "multi_modal_projector.")
        return is_rotary_table(name) or name.removeprefix("model.").startswith(vision)

    def transformers_configs(self, config: Config) -> Iterator[Config]:
        """The language model alone is a text model of transformers."""
        yield {"model_type": "gemma3_text"} | _text_config(config)


def _text_config(config: Config) -> Config:
    return (config.get("text_config") or {}) | {"tie_word_embeddings": config.get("tie_word_embeddings", True)}


def _types(config: Config) -> list[str]:
    """Every sixth block has full attention, the others have the window."""
    every = config.get("sliding_window_pattern", 6)
    return config.get("layer_types") or [
        "full_attention" if (number + 1) % every == 0 else "sliding_attention"
        for number in range(config["num_hidden_layers"])
    ]


def _ropes(config: Config, sizes: Sizes) -> Sizes:
    """Blocks with full attention have one rope, the others another, which is never scaled."""
    both = config.get("rope_parameters") or {}
    full = dict(both.get("full_attention") or {}) | dict(config.get("rope_scaling") or {})
    sliding = both.get("sliding_attention") or {}
    require(sliding, {"rope_type": ("default",)})
    base = float(sliding.get("rope_theta") or config.get("rope_local_base_freq") or 1e4)
    types = _types(config)
    if "full_attention" not in types:
        return {"base_t": base}
    plain = {name: value for name, value in config.items() if name not in ("rope_parameters", "rope_scaling")}
    found = rope_sizes(plain | {"rope_parameters": full}, sizes, default_base=1e6)
    return found | ({"window_base_t": base} if "sliding_attention" in types else {})
