"""Phi-3 and Phi-4 (mini): queries, keys and values in one stored matrix, gate and up in another; partial rotary."""

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


def _renamed(config: Config) -> Config:
    """``su`` and ``yarn`` are older names of ``longrope`` in this family."""
    config = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        if rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            config[key] = rope | {"rope_type": "longrope"}
    return config


def _rows(sizes: Sizes) -> list[int]:
    """Rows of queries, keys and values."""
    keys = sizes["num_kv_heads"] * sizes["head_width"]
    return [sizes["num_heads"] * sizes["head_width"], keys, keys]


def _joined(sizes: Sizes, ours: list[Tensor]) -> list[Tensor]:
    return [torch.cat(ours)]


QKV = Group(
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    lambda sizes: ["self_attn.qkv_proj.weight"],
    lambda sizes, stored: list(stored[0].split(_rows(sizes))),
    _joined,
)
GATE_UP = Group(
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    lambda sizes: ["mlp.gate_up_proj.weight"],
    lambda sizes, stored: list(stored[0].chunk(2)),
    _joined,
)


@LLM_FAMILIES.register("phi3")
class Phi3(Family):
    """Some channels may stay unrotated; the only rope scaling is longrope."""

    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
    groups = (QKV, GATE_UP)

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for a Phi-3 config."""
        found = block_sizes(config) | {"qk_norm": "none"}
        rope = rope_sizes(_renamed(config), found, kinds=("default", "longrope"))
        return found | rope | window_sizes(config, None, None)
