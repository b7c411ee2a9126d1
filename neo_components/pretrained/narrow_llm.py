"""A narrower language model with the tokenizer of a larger one: fewer axes of its word embeddings, and new blocks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
"""A chat template without roles: fewer tokens for each question than ChatML has."""


def narrow_llm(
    source: str | Path,
    folder: str | Path,
    *,
    width: int,
    depth: int = 4,
    head_width: int = 64,
    feed_forward: int | None = None,
    seed: int = 0,
) -> float:
    """Makes a narrower language model with the tokenizer of another one, to be trained from random blocks.

    Its word embeddings, which its head shares, are those of the other model along their principal axes, without mean.

    Args:
        source: folder of a Llama-like model in the Hugging Face layout.
        folder: is made at the end, so that it is there whole or not at all.
        width: D, less than that of ``source``, a multiple of ``head_width``.
        depth: number of blocks.
        head_width: E; there are two query heads for each key/value head, if their number is even.
        feed_forward: inner width of the feed-forward layers; ``None``: three times the width.
        seed: of the blocks.

    Returns:
        The fraction of the embeddings' variance that the axes keep.

    Raises:
        ValueError: if the width is out of its range.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    larger: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    table: Tensor = larger.get_input_embeddings().weight
    if not 0 < width < table.shape[1] or width % head_width:
        raise ValueError(f"width must be a multiple of head_width ({head_width}) below {table.shape[1]}, got {width}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEMPLATE
    vectors, kept = principal(table.detach(), width)
    heads = width // head_width
    config = LlamaConfig(
        vocab_size=len(table), hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        num_key_value_heads=heads if heads % 2 else heads // 2, head_dim=head_width,
        intermediate_size=feed_forward or 3 * width, tie_word_embeddings=True, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5}, max_position_embeddings=8192,
        initializer_range=width**-0.5, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.get_input_embeddings().weight.copy_(vectors)
    write_llm(model, tokenizer, Path(folder))
    return kept


def principal(table: Tensor, width: int) -> tuple[Tensor, float]:
    """Rows [n, D] along their ``width`` principal axes, without mean, and the fraction of variance that is kept."""
    centered = (table - table.mean(0)).double()
    variances, axes = torch.linalg.eigh(centered.T @ centered)
    return (centered @ axes.flip(1)[:, :width]).float(), float(variances.flip(0)[:width].sum() / variances.sum())


def write_llm(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a transformers model with its tokenizer; the folder is there whole or not at all."""
    arriving = folder.with_name(folder.name + ".part")
    shutil.rmtree(arriving, ignore_errors=True)
    model.save_pretrained(arriving)
    tokenizer.save_pretrained(arriving)
    shutil.rmtree(folder, ignore_errors=True)
    arriving.rename(folder)
