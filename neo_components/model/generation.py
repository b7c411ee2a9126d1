"""Autoregressive generation with a key/value cache, for many prompts at once.

The prompts are packed into one sequence for the prefill (mixed mask); then each step computes one token per prompt
(``decoding.py``). Nothing is kept on the model between calls.

Some language models rotate long documents by other frequencies than short ones (``components/rope_scaling.py``). When a
document grows into another rope length bucket its cached keys are void, and the prefill runs again: once for
``longrope``, at every token beyond the original context for ``dynamic``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neo_components.components.cache import KVCache
from neo_components.model.decoding import Choice, Decoder, Generating, Watch
from neo_components.model.fixed_steps import blocks_as, has_fixed_steps, looks_at_length, prepared_step
from neo_components.types import IGNORED, NO_IMAGE, Batch, DocumentTokens, ImageGrid, TokenKind


@torch.no_grad()
def generate(
    model: Generating,
    prompts: Batch,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_token_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    compile: bool | None = None,
) -> list[Tensor]:
    """Continues packed prompts.

    On CUDA the host never waits for a step. Stop tokens are read a few steps late, and a prompt that has ended goes on,
    unread, until all have. On CPU it is dropped at once.

    Args:
        model: a ``NEO``: has ``hidden``, ``layer_rules``, ``length_buckets``, ``input_spec`` and ``post_llm``.
        prompts: one packed sequence [1, L] without padding.
        max_new_tokens: most tokens to add to each.
        do_sample: draw instead of taking the likeliest token.
        temperature: divides the logits before drawing.
        top_p: draw only among the likeliest tokens that together reach this probability.
        stop_token_ids: a prompt ends with the first of these.
        generator: source of randomness for drawing.
        compile: ``True``: decoding steps have fixed shapes, are compiled by ``torch.compile`` (which takes a minute or
            so, once for each number of prompts and room of the cache) and, on CUDA, replayed as a CUDA graph.
            ``False``: step by step. ``None``: on CUDA, from ``fixed_steps.GRAPH_FROM`` new tokens on, a CUDA graph of
            the uncompiled step, which takes no longer to make than a few steps; otherwise as ``False``.

    Returns:
        One [new] int64 tensor per prompt, on the CPU, the stop token included.

    Raises:
        ValueError: if a setting is out of range, or ``compile`` is ``True`` and a step of the model waits for the host.
    """
    if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            "needs max_new_tokens >= 1, temperature > 0 and 0 < top_p <= 1, got "
            f"{max_new_tokens}, {temperature} and {top_p}"
        )
    device = prompts.token_ids.device
    fixed = has_fixed_steps(model, device, max_new_tokens, compile)
    later = later_positions(model, prompts, max_new_tokens)
    choose = Choice(do_sample, temperature, top_p, generator)
    # Blocks that were compiled for training would be compiled again for each length of the cache.
    with ExitStack() as stack:
        stack.enter_context(blocks_as(model, lambda block: None))
        decoder = start(model, prompts, later, choose, stop_token_ids, fixed)
        step = stack.enter_context(prepared_step(decoder, fixed, compile is True))
        rows = _continue(model, prompts, decoder, step, later, Watch(len(stop_token_ids), device, fixed))
    return [_up_to_stop(row, stop_token_ids) for row in rows]


def start(
    model: Generating, prompts: Batch, later: Tensor, choose: Choice, stop_token_ids: Sequence[int], fixed: bool
) -> Decoder:
    """Reads the prompts and chooses the first token of each; ``later``: from :func:`later_positions`."""
    cache = _cache(model, prompts, later.shape[1], fixed)
    hidden = _prefill(model, prompts, cache)
    stop = torch.tensor(list(stop_token_ids), dtype=torch.int64, device="cpu").to(hidden.device)
    decoder = Decoder(model, cache, later, choose, stop)
    decoder.take(hidden)
    return decoder


def _continue(
    model: Generating, prompts: Batch, decoder: Decoder, step: Callable[[], None], later: Tensor, watch: Watch
) -> list[list[int]]:
    """The tokens of each prompt, after steps until all have ended or there is no room left."""
    documents, room = later.shape[:2]
    by_length = looks_at_length(model)
    active = list(range(documents))
    rows: list[list[int]] = [[] for _ in active]

    def read(made: int) -> None:
        for document, tokens in zip(active, decoder.tokens[:, :made].tolist(), strict=True):
            rows[document] = tokens

    made = 1
    while made < room:
        ended = watch(decoder.finished)
        if all(ended):
            break
        if any(ended) and watch.drops:
            read(made)
            going = [row for row, end in enumerate(ended) if not end]
            decoder.keep(going)
            active = [active[row] for row in going]
        if by_length and _rotates_again(model, later[active, made - 1]):
            read(made)
            decoder.take(_read_again(model, _grown(prompts, later, rows), decoder, active, room - made))
        else:
            step()
        made += 1
    read(made)
    return rows


def _up_to_stop(tokens: list[int], stop: Sequence[int]) -> Tensor:
    ends = [number for number, token in enumerate(tokens) if token in stop]
    return torch.tensor(tokens[: ends[0] + 1] if ends else tokens, dtype=torch.int64)


def _cache(model: Generating, prompts: Batch, room: int, fixed: bool = False) -> KVCache:
    return KVCache(
        prompts.document_ids, prompts.image_ids, model.layer_rules, room, prompts.token_kinds, fixed, prompts.known
    )


def _prefill(model: Generating, prompts: Batch, cache: KVCache) -> Tensor:
    """Fills the cache; the hidden state of the last token of each prompt, [S, D]."""
    return model.hidden(prompts, cache.layers)[0].index_select(0, cache.ends())


def _read_again(model: Generating, grown: Batch, decoder: Decoder, active: list[int], room: int) -> Tensor:
    """Fills a new cache by all that there is of the active documents; the hidden states of their last tokens."""
    decoder.cache = _cache(model, grown, room)
    hidden = _prefill(model, grown, decoder.cache)[active]
    decoder.cache.keep(active)
    return hidden


def _rotates_again(model: Generating, positions: Tensor) -> bool:
    """Whether tokens at these positions [S, 3], on the CPU, change the frequencies that those before them got."""
    ends = [math.ceil(end) for end in positions[:, 0].tolist()]
    return any(model.length_buckets(end) != model.length_buckets(end + 1) for end in ends)


def _grown(prompts: Batch, later: Tensor, new: list[list[int]]) -> Batch:
    """The prompts, each followed by its new tokens."""
    names = ("token_ids", "positions", "document_ids", "image_ids", "token_kinds")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    known = prompts.indices.ids
    for document, tokens in enumerate(new):
        inside = known["document_ids"][0] == document
        ids = torch.tensor(tokens, dtype=torch.int64)
        columns["token_ids"] += [known["token_ids"][0, inside], ids]
        columns["positions"] += [known["positions"][0, inside], later[document, : len(tokens)]]
        columns["document_ids"] += [known["document_ids"][0, inside], torch.full_like(ids, document)]
        columns["image_ids"] += [known["image_ids"][0, inside], torch.full_like(ids, NO_IMAGE)]
        columns["token_kinds"] += [known["token_kinds"][0, inside], torch.full_like(ids, TokenKind.TEXT)]
    changed: dict[str, Any] = {name: torch.cat(parts)[None] for name, parts in columns.items()}
    changed["labels"] = torch.full_like(changed["token_ids"], IGNORED)
    changed["loss_weights"] = torch.zeros(changed["labels"].shape)
    return replace(prompts, **changed).to(prompts.token_ids.device)


def later_positions(model: Generating, prompts: Batch, count: int) -> Tensor:
    """[S, count, 3], on the CPU: positions that the model's index rule gives the tokens after each prompt, as text."""
    spec, known = model.input_spec, prompts.indices.ids
    document_ids, image_ids, kinds = (known[name][0] for name in ("document_ids", "image_ids", "token_kinds"))
    grids = (known["image_grids"] // spec.fold).tolist()
    found = []
    for document in range(int(document_ids.max()) + 1):
        inside = document_ids == document
        images = image_ids[inside]
        numbers = images[images != NO_IMAGE].unique().tolist()
        if numbers:
            images = torch.where(images == NO_IMAGE, images, images - numbers[0])
        text = torch.full((count,), NO_IMAGE)
        longer = DocumentTokens(
            torch.cat([images, text]),
            torch.cat([kinds[inside], torch.full_like(text, TokenKind.TEXT)]),
            [ImageGrid(grids[number][0], grids[number][1], prompts.frame_of(0, number)) for number in numbers],
        )
        found.append(spec.index_rule(longer)[len(images) :])
    return torch.stack(found)
