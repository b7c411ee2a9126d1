"""Tiny random language models of transformers, one per family, saved as ordinary folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from builders import randomize

SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "eos_token_id": None,
    "bos_token_id": None, "attn_implementation": "eager",
}  # fmt: skip
LENGTH = 80
"""Tokens of a test sequence: beyond every window and every original context below."""

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
}  # fmt: skip
BASE = {"rope_type": "default", "rope_theta": 5e5}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 4}
WIDE = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8}

# Family -> settings that differ from SIZES; the first is always the plain one.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3": {
        "gqa": {"head_dim": 16},
        "mha-tied": {**MHA, "head_dim": 8, "tie_word_embeddings": True},
        "bias-yarn": {"head_dim": 8, "attention_bias": True, "rope_parameters": YARN},
        "window": {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    },
    "qwen2": {
        "gqa": {},
        "mha-tied": {**MHA, "tie_word_embeddings": True},
        "yarn": {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 0.5}},
        "window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    },
    "llama": {
        "gqa": {},
        "mha-tied": {**MHA, "tie_word_embeddings": True, "rope_parameters": BASE},
        "mqa-wide": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-3},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "llama3": {"rope_parameters": LLAMA3},
        "linear": {"rope_parameters": LINEAR},
        "dynamic": {"rope_parameters": DYNAMIC},
        "yarn": {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}},
        "yarn-mscale": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
        "longrope": {"rope_parameters": LONGROPE | {"factor": 4.0, "original_max_position_embeddings": 20}},
    },
    "smollm3": {
        "gqa": {"num_hidden_layers": 5, "tie_word_embeddings": True},
        "mha-untied": {**MHA, "tie_word_embeddings": False, "no_rope_layers": [0, 1, 0], "attention_bias": True},
        "yarn-window": {
            "num_hidden_layers": 4, "rope_parameters": YARN, "use_sliding_window": True, "sliding_window": 6,
            "mlp_bias": True,
        },
    },
    "mistral": {
        "gqa": {"sliding_window": 11},
        "mha-tied": {**MHA, "sliding_window": None, "tie_word_embeddings": True},
        "wide": {**WIDE, "hidden_size": 24, "sliding_window": 3, "rope_parameters": YARN},
    },
    "gemma3_text": {
        "gqa": {"num_hidden_layers": 7, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8},
        "mha-untied": {
            **MHA, "head_dim": 8, "tie_word_embeddings": False, "sliding_window": 5, "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "linear": {
            "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 4, "rope_parameters": {
                "full_attention": LINEAR | {"rope_theta": 2e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    },
    "phi3": {
        "gqa": {},
        "mha-tied": {**MHA, "tie_word_embeddings": True, "sliding_window": 13},
        "partial": {
            "hidden_size": 64, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            },
        },
        "longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20},
        "longrope-partial": {
            "hidden_size": 64, "original_max_position_embeddings": 20,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
        },
    },
    "olmo2": {
        "gqa": {},
        "mha-tied": {**MHA, "tie_word_embeddings": True},
        "bias-linear": {"attention_bias": True, "rope_parameters": LINEAR},
    },
    "granite": {
        "gqa": {
            "attention_multiplier": 0.2, "residual_multiplier": 0.3, "embedding_multiplier": 12.0,
            "logits_scaling": 0.7,
        },
        "mha-tied": {**MHA, "tie_word_embeddings": True, "attention_multiplier": 0.5, "logits_scaling": 2.0},
        "biases": {"attention_bias": True, "mlp_bias": True, "embedding_multiplier": 3.0},
    },
    "qwen3_moe": {
        "gqa": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
        "mha-tied": {
            **MHA, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 12, "tie_word_embeddings": True,
        },
        "mixed": {
            "num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 20, "num_hidden_layers": 5,
            "decoder_sparse_step": 2, "mlp_only_layers": [3], "head_dim": 16, "attention_bias": True,
        },
        "window": {
            "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 12, "use_sliding_window": True,
            "sliding_window": 10,
        },
    },
}  # fmt: skip


def reference(family: str, folder: Path, seed: int = 1, **options: Any) -> Any:
    """A random model of a family, saved in ``folder``; every weight, norm gain and bias counts.

    Args:
        family: ``model_type``.
        folder: where it is saved.
        seed: of the weights.
        options: of the config; ``max_shard_size`` is one of the saving.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    save = {name: options.pop(name) for name in ("max_shard_size",) if name in options}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(SIZES | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    shake(model, seed)
    model.save_pretrained(folder, **save)
    return model


def shake(model: Any, seed: int) -> None:
    """Random weights for a model of transformers; gains of norms lie around 1 in either form."""
    randomize(model, seed)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Gemma3RMSNorm":
                module.weight -= 1
            elif type(module).__name__ == "Gemma3TextScaledWordEmbedding":
                # As large as what the blocks add, in spite of the factor, so that what they do is seen.
                module.weight *= 0.4


def plain(family: str, folder: Path, **options: Any) -> Any:
    """The family's first case."""
    return reference(family, folder, **(next(iter(CASES[family].values())) | options))
