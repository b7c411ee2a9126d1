"""One decoding step: the token that each document got goes through the model, and the next one is chosen.

Everything that a step reads or writes stays on the device: tokens, positions, lengths and which documents ended. So the
host never waits in a step; ``fixed_steps.py`` compiles it and replays it as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_components.components.block_inputs import Attend
from neo_components.types import IGNORED, NO_IMAGE, Batch, InputSpec

if TYPE_CHECKING:
    from neo_components.components.cache import KVCache
    from neo_components.components.masks import LayerRule


class Generating(Protocol):
    """The interface that generation needs; ``NEO`` has it."""

    @property
    def input_spec(self) -> InputSpec: ...

    @property
    def layer_rules(self) -> list[LayerRule]: ...

    @property
    def post_llm(self) -> Any: ...

    def length_buckets(self, length: int) -> tuple[int, ...]: ...

    def hidden(self, batch: Batch, attend: Sequence[Attend]) -> Tensor: ...


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen.

    Args:
        do_sample: draw instead of taking the likeliest token.
        temperature: divides the logits before drawing.
        top_p: draw only among the likeliest tokens that together reach this probability.
        generator: source of randomness for drawing.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """[S, V] -> [S] int64."""
        if not self.do_sample:
            return logits.argmax(-1)
        weights = (logits.float() / self.temperature).softmax(-1)
        if self.top_p == 1.0:
            return self._draw(weights)
        ranked, order = weights.sort(descending=True)
        # A token is kept if those before it have not reached top_p yet.
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= self.top_p, 0.0)
        return order.gather(-1, self._draw(ranked)[:, None])[:, 0]

    def _draw(self, weights: Tensor) -> Tensor:
        """An index for each of [S, V] weights, in proportion to them: the first arrival of exponential clocks.
        ``torch.multinomial`` does the same, but checks the weights on the host first."""
        waiting = torch.empty_like(weights).exponential_(generator=self.generator)
        return (weights / waiting.clamp_(min=torch.finfo(weights.dtype).tiny)).argmax(-1)


class Decoder:
    """Documents while they are continued.

    Args:
        model: a ``NEO``.
        cache: filled by the prompts.
        later: [S, new, 3] positions of the new tokens, on the CPU.
        choose: how tokens are chosen.
        stop: [n] int64, ids that end a document, on the model's device.

    Attributes:
        tokens: [S, new] int64, those so far and zeros; where shapes are fixed, as long as the cache's room.
        finished: [S] bool, which documents have ended. These go on, unread, until they are dropped.
        cache: may be replaced between two steps.
    """

    def __init__(self, model: Generating, cache: KVCache, later: Tensor, choose: Choice, stop: Tensor) -> None:
        self.model, self.cache, self.choose, self._stop = model, cache, choose, stop
        device = stop.device
        if cache.fixed:  # so that what is compiled does not depend on the number of new tokens
            later = F.pad(later, (0, 0, 0, cache.room - later.shape[1]))
        self._later, self._host_later = later.to(device), later
        self.tokens = torch.zeros(later.shape[:2], dtype=torch.int64, device=device)
        self.finished = torch.zeros(len(later), dtype=torch.bool, device=device)
        self._made = torch.zeros(1, dtype=torch.int64, device=device)
        self._made_on_host = 0
        self._newest = one_word_each(len(later), later.dtype).to(device)

    def step(self) -> None:
        """Reads the newest token of each document and chooses the next."""
        self.begin()
        self.take(self.model.hidden(self._newest, self.cache.layers)[:, 0])
        self.cache.advance()

    def begin(self) -> None:
        """Positions and masks of the newest tokens."""
        self._newest.positions.copy_(self._later.index_select(1, self._made - 1))
        if not self.cache.fixed:  # for frequencies that depend on a document's length
            made = self._made_on_host
            self._newest.indices.ids["positions"].copy_(self._host_later[:, made - 1 : made])
        self.cache.open()

    def take(self, hidden: Tensor) -> None:
        """Chooses the next token of each document by the hidden state of its last one, [S, D]."""
        token = self.choose(self.model.post_llm.logits(hidden))[:, None]
        # A step that failed before this line has changed nothing that it does not write again.
        self.tokens.index_copy_(1, self._made, token)
        self._newest.token_ids.copy_(token)
        self.finished.logical_or_((token == self._stop).any(-1))
        self._made.add_(1)
        if not self.cache.fixed:
            self._made_on_host += 1

    def keep(self, documents: Sequence[int]) -> None:
        """Drops all documents but these, whose tokens are read before."""
        index = torch.tensor(documents, device=self.tokens.device)
        self.cache.keep(documents)
        self._later, self.tokens, self.finished = self._later[index], self.tokens[index], self.finished[index]
        self._host_later = self._host_later[documents]
        newest = self._newest.token_ids[index]
        self._newest = one_word_each(len(documents), self._later.dtype).to(self.tokens.device)
        self._newest.token_ids.copy_(newest)


def one_word_each(count: int, dtype: torch.dtype) -> Batch:
    """A batch of one word per document, [S, 1], on the CPU; ids and positions [S, 1, 3] are filled in later."""
    ids = torch.zeros(count, 1, dtype=torch.int64)
    return Batch(
        token_ids=ids,
        positions=torch.zeros(count, 1, 3, dtype=dtype),
        document_ids=torch.zeros_like(ids),
        image_ids=torch.full_like(ids, NO_IMAGE),
        labels=torch.full_like(ids, IGNORED),
        loss_weights=torch.zeros(ids.shape),
        patches=torch.zeros(0, 1),
        patch_positions=torch.zeros(0, 2, dtype=torch.int64),
    )


EVERY = 8
"""Steps between two looks at which documents have ended, where steps do not wait for the host."""


class Watch:
    """Looks which documents have ended.

    On CPU after every step. On CUDA, and where shapes are fixed, every ``EVERY`` steps, and it gets what was sent one
    look before: the device goes on meanwhile, and the host is never more than two looks ahead of it.

    Args:
        stops: number of ids that end a document; with none, nothing is read.
        device: of the flags.
        fixed: whether all steps have the same shapes.

    Attributes:
        drops: whether documents that have ended are dropped.
    """

    def __init__(self, stops: int, device: torch.device, fixed: bool) -> None:
        self._stops, self._cuda = stops, device.type == "cuda"
        self.drops = not (fixed or self._cuda)
        self._calls = 0
        self._sent: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def __call__(self, finished: Tensor) -> list[bool]:
        """Which documents of [S] flags have ended, as far as it is known."""
        if not self._stops:
            return [False]
        if self.drops:
            return finished.tolist()
        self._calls += 1
        if self._calls % EVERY:
            return [False]
        self._sent.append(self._send(finished))
        if len(self._sent) == 1:
            return [False]
        flags, arrived = self._sent.pop(0)
        if arrived is not None:
            arrived.synchronize()
        return flags.tolist()

    def _send(self, finished: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        if not self._cuda:
            return finished.clone(), None
        flags = torch.empty(finished.shape, dtype=torch.bool, pin_memory=True)
        flags.copy_(finished, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return flags, arrived
