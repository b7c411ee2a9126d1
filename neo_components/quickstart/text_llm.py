"""Trains a small language model and its tokenizer on text alone: the quickstart's stand-in for a pretrained LLM.

The result is an ordinary Hugging Face folder (Qwen3 architecture, ChatML form), so that the library reads it in the
same way as a released model. The tokenizer is a byte-level BPE, learnt from the same conversations.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neo_components.data.conversation import ROLES, TURN_END, TURN_START
from neo_components.data.templates import CHATML
from neo_components.progress import progress
from neo_components.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

Conversation = Sequence[dict[str, str]]
"""Turns ``{"from": "human" | "gpt", "value": text}``."""

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)


@dataclass
class TextLLM:
    """What :func:`train_text_llm` made.

    Args:
        folder: the Hugging Face folder.
        parameters: number of parameters, tied ones counted once.
        vocab_size: V, rows of the word embedding.
        losses: training loss of each step, nats per token.
        seconds: time of the training, tokenizer included.
    """

    folder: Path
    parameters: int
    vocab_size: int
    losses: list[float]
    seconds: float


def train_text_llm(
    conversations: Sequence[Conversation],
    folder: str | Path,
    *,
    hidden_size: int = 128,
    depth: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_width: int = 32,
    feed_forward: int = 384,
    vocab_size: int = 512,
    tie_word_embeddings: bool = True,
    steps: int = 300,
    tokens_per_step: int = 2048,
    learning_rate: float = 3e-3,
    seed: int = 0,
    title: str | None = "training the text LLM",
) -> TextLLM:
    """Learns a tokenizer, trains a Qwen3 model on every token of the conversations, and saves both.

    Args:
        conversations: text-only conversations.
        folder: where the model goes; made if needed.
        hidden_size: D.
        depth: number of blocks.
        heads: N, query heads.
        kv_heads: K, key and value heads.
        head_width: E.
        feed_forward: inner width of the feed-forward layers.
        vocab_size: most tokens the tokenizer may have, special tokens and the 256 bytes included.
        tie_word_embeddings: whether the output layer shares the word embedding.
        steps: optimiser steps, with warm-up over the first tenth and a cosine to 0.
        tokens_per_step: most tokens of a step, padding included.
        learning_rate: highest rate of AdamW.
        seed: of the initial weights and the order of the conversations; torch's global state is left as it was.
        title: shown with the progress; ``None`` shows nothing.

    Raises:
        ValueError: if there is no conversation, a turn is of an unknown speaker, or ``vocab_size`` is too small.
    """
    started = time.monotonic()
    folder = Path(folder)
    texts = [to_chatml(conversation) for conversation in conversations]
    if not texts:
        raise ValueError("no conversation to learn from; give at least one")
    tokenizer = train_tokenizer(texts, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _new_model(
            tokenizer,
            hidden_size=hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_width,
            intermediate_size=feed_forward,
            tie_word_embeddings=tie_word_embeddings,
        )
        losses = _train(model, tokenizer(texts)["input_ids"], steps, tokens_per_step, learning_rate, seed, title)
    _save(model, tokenizer, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TextLLM(folder, parameters, model.config.vocab_size, losses, time.monotonic() - started)


def to_chatml(conversation: Conversation) -> str:
    """The conversation as the text that the model sees.

    Raises:
        ValueError: if a turn's speaker is not human, gpt or system.
    """
    parts = []
    for turn in conversation:
        if turn["from"] not in ROLES:
            raise ValueError(f"unknown speaker {turn['from']!r} in a conversation; allowed: {list(ROLES)}")
        parts.append(f"{TURN_START}{ROLES[turn['from']]}\n{turn['value']}{TURN_END}\n")
    return "".join(parts)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learns a byte-level BPE tokenizer; any text can be written with it, also one with unseen words.

    Args:
        texts: the corpus, in ChatML form.
        vocab_size: most tokens; fewer are made if the corpus has no more pairs to join.

    Raises:
        ValueError: if the bytes and special tokens alone take more than ``vocab_size``.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but 256 bytes and the special tokens need at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _new_model(tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> Qwen3ForCausalLM:
    """A Qwen3 model with the library's usual initial weights."""
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        initializer_range=sizes["hidden_size"] ** -0.5,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **sizes,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the Hugging Face folder, without the progress bar that transformers shows for its one small file."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def _train(
    model: Qwen3ForCausalLM,
    documents: list[list[int]],
    steps: int,
    tokens_per_step: int,
    learning_rate: float,
    seed: int,
    title: str | None,
) -> list[float]:
    """Next-token training on every token; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(steps // 10, 1)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warm_up, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, fall], [warm_up])
    shuffle = random.Random(seed)
    batches: list[list[int]] = []
    losses = []
    model.train()
    with progress(title, total=steps) as bar:
        for _ in range(steps):
            batches = batches or _batches(documents, tokens_per_step, shuffle)
            token_ids, labels = _pad([documents[number] for number in batches.pop()])
            loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.advance(note=f"loss {losses[-1]:.3f}")
    model.eval()
    return losses


def _batches(documents: list[list[int]], tokens_per_step: int, shuffle: random.Random) -> list[list[int]]:
    """One pass over the documents: numbers of about equally long ones together, in random order."""
    order = sorted(range(len(documents)), key=lambda number: (len(documents[number]), shuffle.random()))
    batches: list[list[int]] = [[]]
    for number in order:
        # In ascending order the newest document is the longest of its batch, so this counts the padding too.
        if batches[-1] and (len(batches[-1]) + 1) * len(documents[number]) > tokens_per_step:
            batches.append([])
        batches[-1].append(number)
    shuffle.shuffle(batches)
    return batches


def _pad(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, L]; padding stands at the end, where causal attention needs no mask against it."""
    length = max(map(len, documents))
    token_ids = torch.zeros(len(documents), length, dtype=torch.int64)
    labels = torch.full_like(token_ids, IGNORED)
    for row, document in enumerate(documents):
        token_ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
    return token_ids, labels
