"""InternLM2 and 2.5: Llama under other names, with queries, keys and values interleaved in one stored matrix.

Its files come with their own code; names and layout are those of that code (``modeling_internlm2.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from neo_components.llms.family import Config, Family, Group, Sizes, block_sizes, rope_sizes
from neo_components.registry import LLM_FAMILIES

NAMES = {
    "lm_head.": "output.",
    "word_embedding.": "model.tok_embeddings.",
    "norm.": "model.norm.",
    "layers.": "model.layers.",
}
PARTS = {
    "self_attn.o_proj.": "attention.wo.",
    "mlp.gate_proj.": "feed_forward.w1.",
    "mlp.up_proj.": "feed_forward.w3.",
    "mlp.down_proj.": "feed_forward.w2.",
    "input_layernorm.": "attention_norm.",
    "post_attention_layernorm.": "ffn_norm.",
}


def _split(sizes: Sizes, stored: list[Tensor]) -> list[Tensor]:
    """Per key/value head: its query heads, then its key, then its value."""
    queries = sizes["num_heads"] // sizes["num_kv_heads"]
    heads = stored[0].unflatten(0, (sizes["num_kv_heads"], queries + 2, sizes["head_width"]))
    return [heads[:, :queries].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)]


def _join(sizes: Sizes, ours: list[Tensor]) -> list[Tensor]:
    heads = [tensor.unflatten(0, (sizes["num_kv_heads"], -1, sizes["head_width"])) for tensor in ours]
    return [torch.cat(heads, dim=1).flatten(0, 2)]


def _qkv(kind: str) -> Group:
    ours = tuple(f"self_attn.{part}_proj.{kind}" for part in "qkv")
    return Group(ours, lambda sizes: [f"attention.wqkv.{kind}"], _split, _join)


@LLM_FAMILIES.register("internlm2")
class InternLM2(Family):
    """``bias`` is one of all four projections of the attention."""

    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "bias": True}
    supported = {"hidden_act": ("silu",), "head_dim": (None,)}
    groups = (_qkv("weight"), _qkv("bias"))

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM`` for an InternLM2 config."""
        found, bias = block_sizes(config), bool(config["bias"])
        found |= {"qk_norm": "none", "qkv_bias": bias, "output_bias": bias}
        return found | rope_sizes(config, found, kinds=("default", "linear", "dynamic"))

    def rename(self, name: str) -> str:
        """A post-LLM weight's name -> InternLM2's."""
        top = next(top for top in NAMES if name.startswith(top))
        name = NAMES[top] + name.removeprefix(top)
        part = next((part for part in PARTS if f".{part}" in name), None)
        return name if part is None else name.replace(part, PARTS[part])

    def transformers_configs(self, config: Config) -> Iterator[Config]:
        """transformers has no InternLM2 of its own; it computes what a Llama computes."""
        yield config
        kept = {name: value for name, value in config.items() if name not in ("auto_map", "bias")}
        yield kept | {"attention_bias": config.get("bias", True), "model_type": "llama"}
