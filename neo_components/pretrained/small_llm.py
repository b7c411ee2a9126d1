"""A small language model with the tokenizer and the word embeddings of a larger one: some of its blocks, distilled.

The larger model's final hidden states teach it: head and word embedding are shared and frozen, so equal states are
equal predictions. The squared difference of all logits, centered for each token, is a quadratic form of the difference
of the states, ``d^T C d`` with the covariance C of the head's rows, and costs no product with the head. For some tokens
the divergence of the two distributions is added.

Source: Hinton et al. 2015 (arXiv 1503.02531) for distillation; Sanh et al. 2019 (arXiv 1910.01108) for the start from
blocks of the larger model.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neo_components.storage.progress import progress

LENGTH = 256
"""Tokens of a sequence."""
SAMPLED = 8
"""Of so many tokens one is compared in all logits."""


def make_small_llm(
    source: str | Path,
    folder: str | Path,
    texts: Sequence[str],
    *,
    blocks: Sequence[int] = (0, 1, 28, 29),
    minutes: float = 10.0,
    steps: int = 300,
    tokens_per_step: int = 4096,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    title: str | None = "small language model",
) -> list[float]:
    """Makes a language model of some blocks of another one and distills it.

    Args:
        source: folder of a Llama-like model in the Hugging Face layout.
        folder: is made at the end, so that it is there whole or not at all.
        texts: documents, with special tokens as text; at least as many tokens as a step has.
        blocks: which of its blocks, in order.
        minutes: after so many minutes the learning rate has fallen to 0, however many steps were made.
        steps: most steps; the learning rate then falls earlier.
        tokens_per_step: a multiple of :data:`LENGTH`.
        learning_rate: peak of AdamW's.
        seed: of the order of the texts.
        device: to train on, in bfloat16 with float32 weights.
        title: of the progress; ``None`` shows nothing.

    Returns:
        The loss of each step: ``d^T C d`` plus the divergence in nats.

    Raises:
        ValueError: if a block does not exist, or there is too little text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    teacher: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source)
    student = cut_blocks(teacher, blocks)
    rows = sequences(tokenizer, texts, seed)
    if len(rows) * LENGTH < tokens_per_step:
        raise ValueError(
            f"the texts have {len(rows) * LENGTH} tokens, fewer than a step ({tokens_per_step}); give more texts"
        )
    teacher, student = teacher.to(device, torch.bfloat16), student.to(device)
    losses = _distill(teacher, student, rows, tokens_per_step // LENGTH, minutes, steps, learning_rate, seed, title)
    write_llm(student.cpu(), tokenizer, Path(folder))
    return losses


def write_llm(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a transformers model with its tokenizer; the folder is there whole or not at all."""
    arriving = folder.with_name(folder.name + ".part")
    shutil.rmtree(arriving, ignore_errors=True)
    model.save_pretrained(arriving)
    tokenizer.save_pretrained(arriving)
    shutil.rmtree(folder, ignore_errors=True)
    arriving.rename(folder)


def cut_blocks(model: Any, blocks: Sequence[int]) -> Any:
    """A copy of a transformers model with only some of its blocks.

    Raises:
        ValueError: if there is none, or one does not exist.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    depth = model.config.num_hidden_layers
    if not blocks or not all(0 <= block < depth for block in blocks):
        raise ValueError(f"blocks must be some of 0 to {depth - 1}, got {list(blocks)}")
    config = AutoConfig.for_model(**model.config.to_dict() | {"num_hidden_layers": len(blocks)})
    small = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    small.generation_config = model.generation_config
    with torch.no_grad():
        small.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight)
        small.get_output_embeddings().weight.copy_(model.get_output_embeddings().weight)
    small.model.norm.load_state_dict(model.model.norm.state_dict())
    for mine, block in zip(small.model.layers, blocks, strict=True):
        mine.load_state_dict(model.model.layers[block].state_dict())
    return small


def sequences(tokenizer: Any, texts: Sequence[str], seed: int) -> Tensor:
    """[n, LENGTH] token ids of the texts in random order, one after the other without gaps."""
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    ids: list[int] = []
    for begin in range(0, len(order), 1000):
        for part in tokenizer([texts[number] for number in order[begin : begin + 1000]])["input_ids"]:
            ids += part
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH], dtype=torch.int64, device="cpu").view(-1, LENGTH)


def _distill(
    teacher: Any, student: Any, rows: Tensor, count: int, minutes: float, steps: int, rate: float, seed: int,
    title: str | None,
) -> list[float]:  # fmt: skip
    device = student.device
    for parameter in (*teacher.parameters(), *student.get_input_embeddings().parameters()):
        parameter.requires_grad_(False)
    head = teacher.get_output_embeddings().weight
    spread = torch.cov(head.float().T)
    trained = [parameter for parameter in student.model.layers.parameters()] + [*student.model.norm.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    order, losses, began = _endless(len(rows), count, seed), [], time.monotonic()
    student.train()
    with progress(title, total=steps) as bar:
        for step in range(steps):
            done = max(step / steps, (time.monotonic() - began) / (60 * minutes))
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - done)
            ids = rows[next(order)].to(device)
            with torch.no_grad():
                wanted = teacher.model(ids, use_cache=False).last_hidden_state
            with torch.autocast(device.type, torch.bfloat16):
                given = student.model(ids, use_cache=False).last_hidden_state
            loss = state_loss(given.flatten(0, 1), wanted.flatten(0, 1), spread, head, step)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            bar.advance(note=f"loss {sum(losses[-10:]) / len(losses[-10:]):.3f}")
    student.eval()
    return losses


def state_loss(given: Tensor, wanted: Tensor, spread: Tensor, head: Tensor, offset: int = 0) -> Tensor:
    """Distance of predictions: half the mean squared difference of centered logits, plus the divergence at some tokens.

    Args:
        given: [n, D] final states of the student.
        wanted: [n, D] those of the teacher.
        spread: [D, D] covariance of the head's rows.
        head: [V, D].
        offset: the first of the tokens whose divergence is taken, modulo :data:`SAMPLED`.
    """
    apart = given.float() - wanted.float()
    squared = ((apart @ spread) * apart).sum(-1).mean()
    some = slice(offset % SAMPLED, None, SAMPLED)
    with torch.no_grad():
        target = F.log_softmax(F.linear(wanted[some].to(head.dtype), head).float(), -1)
    mine = F.log_softmax(F.linear(given[some].to(head.dtype), head).float(), -1)
    return squared / 2 + F.kl_div(mine, target, reduction="batchmean", log_target=True)


def _endless(total: int, count: int, seed: int) -> Iterator[Tensor]:
    """Indices of ``count`` sequences at a time, each once in an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(total, generator=generator)
        yield from order[: total // count * count].view(-1, count)
