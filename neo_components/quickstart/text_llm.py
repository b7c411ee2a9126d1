"""Trains a small language model and its tokenizer on text, which replaces a pretrained LLM in the quickstart.

The result is an ordinary Hugging Face folder with a ChatML template, which the library reads like a released model. The
tokenizer is a BPE trained on the same conversations.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neo_components.data.text.templates import CHATML, TURN_END, TURN_START
from neo_components.data.text.turns import ROLES
from neo_components.storage.progress import progress
from neo_components.types import IGNORED

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Conversation = Sequence[dict[str, str]]
"""Turns ``{"from": "human" | "gpt", "value": text}``."""

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
PIECES = ("bytes", "spaces")
"""Kinds of tokenizer: byte-level BPE like Qwen's, or spaces as ``▁`` with byte fallback ``<0x00>`` to ``<0xFF>`` like
those of sentencepiece (Llama 2, Gemma)."""
SHOWN_EVERY = 10
"""Steps from one loss in the progress to the next."""


@dataclass
class TextLLM:
    """The result of :func:`train_text_llm`.

    Args:
        folder: the Hugging Face folder.
        parameters: number of parameters, tied ones counted once.
        vocab_size: V, rows of the word embedding.
        losses: training loss of each step, nats per token.
        seconds: duration of the training, including the tokenizer.
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
    family: str = "qwen3",
    pieces: str = "bytes",
    steps: int = 300,
    tokens_per_step: int = 2048,
    learning_rate: float = 3e-3,
    seed: int = 0,
    title: str | None = "training the text LLM",
    device: torch.device | str = "cpu",
) -> TextLLM:
    """Trains a tokenizer, then a model on every token of the conversations, and saves both.

    Args:
        conversations: text-only conversations.
        folder: output folder; created if needed.
        hidden_size: D.
        depth: number of blocks.
        heads: N, query heads.
        kv_heads: K, key and value heads.
        head_width: E.
        feed_forward: inner width of the feed-forward layers.
        vocab_size: maximum size of the vocabulary, including special tokens and the 256 bytes.
        tie_word_embeddings: whether the output layer shares the word embedding.
        family: ``model_type`` of transformers whose config takes these sizes by their usual names: qwen3, llama ...
        pieces: kind of tokenizer, one of ``PIECES``.
        steps: optimizer steps, with warm-up over the first tenth and cosine decay to 0.
        tokens_per_step: maximum number of tokens of a step, including padding.
        learning_rate: peak learning rate of AdamW.
        seed: of the initial weights and the order of the conversations, the same on every device; torch's global
            random state on the CPU is unchanged.
        title: of the progress; ``None`` shows nothing.
        device: to train on, in float32.

    Raises:
        ValueError: if there is no conversation, a turn has an unknown role, or ``vocab_size`` is too small.
    """
    started = time.monotonic()
    folder = Path(folder)
    texts = [to_chatml(conversation) for conversation in conversations]
    if not texts:
        raise ValueError("no conversation to train on; give at least one")
    tokenizer = train_tokenizer(texts, vocab_size, pieces)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = _new_model(
            family,
            tokenizer,
            hidden_size=hidden_size,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_width,
            intermediate_size=feed_forward,
            tie_word_embeddings=tie_word_embeddings,
        )
        losses = _train(
            model.to(device), tokenizer(texts)["input_ids"], steps, tokens_per_step, learning_rate, seed, title
        )
    _save(model, tokenizer, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return TextLLM(folder, parameters, model.config.vocab_size, losses, time.monotonic() - started)


def to_chatml(conversation: Conversation) -> str:
    """The conversation as ChatML text.

    Raises:
        ValueError: if a turn's role is not human, gpt or system.
    """
    parts = []
    for turn in conversation:
        if turn["from"] not in ROLES:
            raise ValueError(f"unknown role {turn['from']!r} in a conversation; allowed: {list(ROLES)}")
        parts.append(f"{TURN_START}{ROLES[turn['from']]}\n{turn['value']}{TURN_END}\n")
    return "".join(parts)


def train_tokenizer(texts: Sequence[str], vocab_size: int, pieces: str = "bytes") -> PreTrainedTokenizerFast:
    """Trains a BPE tokenizer that can encode any text.

    Args:
        texts: the corpus, as ChatML.
        vocab_size: maximum size of the vocabulary; smaller if the corpus has no more pairs to merge.
        pieces: one of ``PIECES``.

    Raises:
        ValueError: if the bytes and special tokens alone take more than ``vocab_size``, or ``pieces`` is unknown.
    """
    from transformers import PreTrainedTokenizerFast

    if pieces not in PIECES:
        raise ValueError(f"pieces must be one of {', '.join(PIECES)}, got {pieces!r}")
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but 256 bytes and the special tokens need at least {smallest}")
    return PreTrainedTokenizerFast(
        tokenizer_object=(_byte_level if pieces == "bytes" else _with_spaces)(texts, vocab_size),
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

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
    return tokenizer


def _with_spaces(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """The layout of converted sentencepiece models: special tokens, the 256 bytes, then the trained pieces."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 256, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer does not add the bytes; they go before the trained pieces.
    trained = json.loads(tokenizer.to_str())["model"]
    names = [*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [token for token in sorted(trained["vocab"], key=trained["vocab"].get) if token not in SPECIAL_TOKENS]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) for pair in trained["merges"]]
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _new_model(family: str, tokenizer: PreTrainedTokenizerFast, **sizes: Any) -> PreTrainedModel:
    """A model with transformers' usual initial weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.for_model(
        family,
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
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the Hugging Face folder without transformers' progress bar."""
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
    model: PreTrainedModel,
    documents: list[list[int]],
    steps: int,
    tokens_per_step: int,
    learning_rate: float,
    seed: int,
    title: str | None,
) -> list[float]:
    """Next-token training on every token; returns the loss of each step."""
    device = model.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warm_up = max(steps // 10, 1)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warm_up, 1))
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, fall], [warm_up])
    shuffle = random.Random(seed)
    batches: list[list[int]] = []
    losses: list[Tensor] = []
    note = ""
    model.train()
    with progress(title, total=steps) as bar:
        for step in range(steps):
            batches = batches or _batches(documents, tokens_per_step, shuffle)
            token_ids, labels = (x.to(device) for x in _pad([documents[number] for number in batches.pop()]))
            loss = model(input_ids=token_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
            if step % SHOWN_EVERY == 0 or step + 1 == steps:  # a read waits for all that a GPU still has to do
                note = f"loss {losses[-1].item():.3f}"
            bar.advance(note=note)
    model.eval()
    return torch.stack(losses).tolist()


def _batches(documents: list[list[int]], tokens_per_step: int, shuffle: random.Random) -> list[list[int]]:
    """One epoch: batches of indices of documents of similar length, in random order."""
    order = sorted(range(len(documents)), key=lambda number: (len(documents[number]), shuffle.random()))
    batches: list[list[int]] = [[]]
    for number in order:
        # Documents are in ascending order, so the last one is the longest and this includes padding.
        if batches[-1] and (len(batches[-1]) + 1) * len(documents[number]) > tokens_per_step:
            batches.append([])
        batches[-1].append(number)
    shuffle.shuffle(batches)
    return batches


def _pad(documents: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels [B, L], padded at the end, where causal attention needs no mask."""
    length = max(map(len, documents))
    token_ids = torch.zeros(len(documents), length, dtype=torch.int64, device="cpu")
    labels = torch.full_like(token_ids, IGNORED)
    for row, document in enumerate(documents):
        token_ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document, device="cpu")
    return token_ids, labels
