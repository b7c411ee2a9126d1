"""Autoregressive generation with a key/value cache, for many prompts at once.

The prompts are packed into one sequence for the prefill (mixed mask); then each step computes one token per prompt.
Nothing is kept on the model between calls.

Some language models rotate long documents by other frequencies than short ones (``components/rope_scaling.py``). When a
document grows into another rope length bucket its cached keys are void, and the prefill runs again: once for
``longrope``, at every token beyond the original context for ``dynamic``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from neo_components.components.backends import KVCache
from neo_components.components.block_inputs import Attend
from neo_components.types import IGNORED, NO_IMAGE, Batch, DocumentTokens, ImageGrid, InputSpec, TokenKind

if TYPE_CHECKING:
    from neo_components.components.masks import LayerRule


class Generating(Protocol):
    """The interface that :func:`generate` needs; ``NEO`` has it."""

    @property
    def input_spec(self) -> InputSpec: ...

    @property
    def layer_rules(self) -> list[LayerRule]: ...

    @property
    def post_llm(self) -> Any: ...

    def length_buckets(self, length: int) -> tuple[int, ...]: ...

    def hidden(self, batch: Batch, attend: Sequence[Attend]) -> Tensor: ...


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
) -> list[Tensor]:
    """Continues packed prompts.

    Args:
        model: a ``NEO``: has ``hidden``, ``layer_rules``, ``length_buckets``, ``input_spec`` and ``post_llm``.
        prompts: one packed sequence [1, L] without padding.
        max_new_tokens: most tokens to add to each.
        do_sample: draw instead of taking the likeliest token.
        temperature: divides the logits before drawing.
        top_p: draw only among the likeliest tokens that together reach this probability.
        stop_token_ids: a prompt ends with the first of these.
        generator: source of randomness for drawing.

    Returns:
        One [new] int64 tensor per prompt, the stop token included.

    Raises:
        ValueError: if a setting is out of range.
    """
    if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1:
        raise ValueError(
            "needs max_new_tokens >= 1, temperature > 0 and 0 < top_p <= 1, got "
            f"{max_new_tokens}, {temperature} and {top_p}"
        )
    cache = _cache(model, prompts, max_new_tokens)
    later = _later_positions(model, prompts, max_new_tokens)
    stop = torch.tensor(list(stop_token_ids), device=prompts.token_ids.device, dtype=torch.int64)
    hidden = _prefill(model, prompts, cache)
    active = torch.arange(len(hidden), device=hidden.device)
    new: list[list[int]] = [[] for _ in hidden]
    for step in range(max_new_tokens):
        logits = model.post_llm.logits(hidden).float()
        token = _draw(logits, temperature, top_p, generator) if do_sample else logits.argmax(-1)
        for prompt, value in zip(active.tolist(), token.tolist(), strict=True):
            new[prompt].append(value)
        going = (~torch.isin(token, stop)).nonzero()[:, 0]
        if step + 1 == max_new_tokens or not len(going):
            break
        if len(going) < len(active):
            cache.keep(going)
            active, token = active[going], token[going]
        if _rotates_again(model, later[active, step]):
            grown = _grown(prompts, later, new)
            cache = _cache(model, grown, max_new_tokens - step)
            hidden = _prefill(model, grown, cache)[active]
            cache.keep(active)
            continue
        hidden = model.hidden(_one_token(token, later[active, step]), cache.layers)[:, 0]
        cache.advance()
    return [torch.tensor(tokens, dtype=torch.int64) for tokens in new]


def _cache(model: Generating, prompts: Batch, room: int) -> KVCache:
    return KVCache(prompts.document_ids, prompts.image_ids, model.layer_rules, room, prompts.token_kinds)


def _prefill(model: Generating, prompts: Batch, cache: KVCache) -> Tensor:
    """Fills the cache; the hidden state of the last token of each prompt, [S, D]."""
    return model.hidden(prompts, cache.layers)[0, cache.lengths.cumsum(0) - 1]


def _rotates_again(model: Generating, positions: Tensor) -> bool:
    """Whether tokens at these positions [S, 3] change the frequencies that the tokens before them were rotated by."""
    ends = [math.ceil(end) for end in positions[:, 0].tolist()]
    return any(model.length_buckets(end) != model.length_buckets(end + 1) for end in ends)


def _grown(prompts: Batch, later: Tensor, new: list[list[int]]) -> Batch:
    """The prompts, each followed by its new tokens."""
    names = ("token_ids", "positions", "document_ids", "image_ids", "token_kinds")
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    for document, tokens in enumerate(new):
        inside = prompts.document_ids[0] == document
        ids = torch.tensor(tokens, dtype=torch.int64, device=inside.device)
        columns["token_ids"] += [prompts.token_ids[0, inside], ids]
        columns["positions"] += [prompts.positions[0, inside], later[document, : len(tokens)]]
        columns["document_ids"] += [prompts.document_ids[0, inside], torch.full_like(ids, document)]
        columns["image_ids"] += [prompts.image_ids[0, inside], torch.full_like(ids, NO_IMAGE)]
        columns["token_kinds"] += [prompts.token_kinds[0, inside], torch.full_like(ids, TokenKind.TEXT)]
    changed: dict[str, Any] = {name: torch.cat(parts)[None] for name, parts in columns.items()}
    changed["labels"] = torch.full_like(changed["token_ids"], IGNORED)
    changed["loss_weights"] = torch.zeros(changed["labels"].shape, device=changed["labels"].device)
    return replace(prompts, **changed)


def _later_positions(model: Generating, prompts: Batch, count: int) -> Tensor:
    """[S, count, 3]: positions that the model's index rule gives the tokens after each prompt, as text."""
    spec = model.input_spec
    document_ids, image_ids, kinds = (
        x[0].cpu() for x in (prompts.document_ids, prompts.image_ids, prompts.token_kinds)
    )
    grids = (prompts.image_grids.cpu() // spec.fold).tolist()
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
    return torch.stack(found).to(prompts.positions.device)


def _one_token(token: Tensor, position: Tensor) -> Batch:
    """A batch of one new token per document: [S, 1]."""
    ids = token[:, None]
    none = torch.full_like(ids, NO_IMAGE)
    return Batch(
        token_ids=ids,
        positions=position[:, None],
        document_ids=torch.zeros_like(ids),
        image_ids=none,
        labels=torch.full_like(ids, IGNORED),
        loss_weights=torch.zeros(ids.shape, device=ids.device),
        patches=torch.zeros(0, 1, device=ids.device),
        patch_positions=torch.zeros(0, 2, dtype=torch.int64, device=ids.device),
    )


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """One token per row of [S, V]."""
    ranked, order = (logits / temperature).softmax(-1).sort(descending=True)
    # A token is kept if those before it have not reached top_p yet.
    ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(ranked, 1, generator=generator))[:, 0]
