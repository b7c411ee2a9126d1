"""Small recipes and how the tests write and check them."""

from __future__ import annotations

from pathlib import Path

from neo_components.recipe import validate_recipe

MODEL = """
model:
  patch_embedding: {width: 16, patch_size: 4}
  pre_buffer: {depth: 1}
  post_llm: {vocab_size: 60, depth: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, head_width: 8,
             feed_forward_size: 48}
"""
RUN = """
stage: {train: [patch_embedding, pre_buffer, post_llm.hw], steps: 20, lr: 1.0e-3}
data:
  tokenizer: folder/llm
  train: [{shards: folder/images, weight: 0.7}, {shards: folder/text, weight: 0.3}]
trainer: {accelerator: cpu, gradient_clip_val: 1}
"""
PRETRAINED = "model: {pre_buffer: {depth: 1}, post_llm: {from_pretrained: not/there}}\n"
ASSET = "model: {pre_buffer: {from_pretrained: not/there}, post_llm: {from_pretrained: not/there}}\n"


def written(folder: Path, text: str, name: str = "my.yaml") -> Path:
    """A recipe file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def faults(path: Path, *overrides: str) -> list[tuple[str, str]]:
    """Key and text of every fault."""
    return [(fault.key, fault.text) for fault in validate_recipe(path, overrides)]
