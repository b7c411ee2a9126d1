"""Qwen3-MoE: Qwen3 whose blocks have experts instead of one feed-forward."""

from __future__ import annotations

import torch
from torch import Tensor

from neo_components.llms.family import (
    Config,
    Family,
    Group,
    Sizes,
    block_sizes,
    rope_sizes,
    window_sizes,
)
from neo_components.registry import LLM_FAMILIES


def _experts(config: Config) -> Sizes:
    count = config.get("num_experts", config.get("num_local_experts", 128))
    dense, step = config.get("mlp_only_layers") or [], config["decoder_sparse_step"]
    depth = config["num_hidden_layers"]
    layers = [number for number in range(depth) if number not in dense and (number + 1) % step == 0]
    if not count or not layers:
        return {}
    return {
        "num_experts": count,
        "experts_per_token": config["num_experts_per_tok"],
        "normalize_experts": bool(config["norm_topk_prob"]),
        "expert_size": config["moe_intermediate_size"],
        "expert_layers": layers,
    }


def _each(sizes: Sizes, *parts: str) -> list[str]:
    return [f"mlp.experts.{number}.{part}_proj.weight" for number in range(sizes["num_experts"]) for part in parts]


def _read_gate_up(sizes: Sizes, stored: list[Tensor]) -> list[Tensor]:
    return [torch.stack([torch.cat(pair) for pair in zip(stored[::2], stored[1::2], strict=True)])]


def _write_gate_up(sizes: Sizes, ours: list[Tensor]) -> list[Tensor]:
    return [part for expert in ours[0] for part in expert.chunk(2)]


# Files hold one tensor per expert, or all of them stacked as the post-LLM does.
GATE_UP = Group(
    ("mlp.experts.gate_up_proj",),
    lambda sizes: _each(sizes, "gate", "up"),
    _read_gate_up,
    _write_gate_up,
    optional=True,
)
DOWN = Group(
    ("mlp.experts.down_proj",),
    lambda sizes: _each(sizes, "down"),
    lambda sizes, stored: [torch.stack(stored)],
    lambda sizes, ours: list(ours[0]),
    optional=True,
)


@LLM_FAMILIES.register("qwen3_moe")
class Qwen3Moe(Family):
    """Unlike in Qwen3, all blocks have the window or none has."""

    defaults = {
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "decoder_sparse_step": 1,
        "moe_intermediate_size": 768, "num_experts_per_tok": 8, "norm_topk_prob": False,
    }  # fmt: skip
    groups = (GATE_UP, DOWN)

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Qwen3-MoE config."""
        found, bias = block_sizes(config), bool(config.get("attention_bias", False))
        found |= {"qkv_bias": bias, "output_bias": bias} | _experts(config)
        window = window_sizes(config, None, 4096) if config.get("use_sliding_window", False) else {}
        return found | rope_sizes(config, found) | window
