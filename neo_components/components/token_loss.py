"""The loss at target tokens, in chunks: the logits of all tokens never exist at once, forward or backward.

The gradient with respect to a chunk's logits is known as soon as the logits are. The forward pass turns it into those
of the hidden states and the head at once, so the backward pass recomputes no logit. The idea is that of cut and fused
cross-entropies (Wijmans et al. 2024, arXiv 2411.09009; Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_components.components.compiling import compiled
from neo_components.components.recompute import autocast_type
from neo_components.token_indices import MULTIPLE

CHUNK = 256
"""Target tokens whose logits exist at the same time, at least."""
LOGITS = 1 << 23
"""Logits that may exist at the same time where ``CHUNK`` tokens have fewer."""


def chunk_size(vocab_size: int, device: torch.device) -> int:
    """Target tokens whose logits are computed together; more on a device, whose products need more rows to be busy."""
    return max(CHUNK, LOGITS // vocab_size) if device.type == "cpu" else MULTIPLE


def token_loss(
    state: Tensor, head: Tensor, target: Tensor, weight: Tensor, divisor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``sum(weight * cross_entropy((state @ head.T) / divisor, target))``.

    Args:
        state: [n, D], hidden states of the tokens that predict a target.
        head: [V, D]; no gradient is computed for a frozen one.
        target: [n] int64.
        weight: [n] float32.
        divisor: of the logits.

    Returns:
        Scalar float32, whose gradient can be taken once; and each token's cross entropy, [n] float32, without gradient.
    """
    if torch.compiler.is_compiling():
        return _in_one_piece(state, head, target, weight, divisor)
    wanted = torch.is_grad_enabled()
    total, each = _TokenLoss.apply(state, head, target, weight, divisor, autocast_type(state), wanted)
    return total, each


def _in_one_piece(state: Tensor, head: Tensor, target: Tensor, weight: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """The same, plain, for a compiler that differentiates it."""
    logits = F.linear(state, head)
    logits = (logits if divisor == 1.0 else logits / divisor).float()
    each = F.cross_entropy(logits, target, reduction="none")
    return (each * weight.float()).sum(), each.detach()


class Chunk(NamedTuple):
    """What is known of a chunk after its forward pass.

    Attributes:
        each: [c] float32, cross entropies.
        of_state: [c, D], gradient of their weighted sum with respect to the states, or ``None``.
        of_head: [V, D], that with respect to the head, or ``None``.
    """

    each: Tensor
    of_state: Tensor | None
    of_head: Tensor | None


def chunk_loss(
    x: Tensor, factor: Tensor, target: Tensor, weight: Tensor, divisor: float, of_state: bool, of_head: bool
) -> Chunk:
    """Cross entropies of a chunk, and the gradients that are wanted.

    Args:
        x: [c, D], in the type of ``factor``.
        factor: [V, D], the head.
        target: [c] int64.
        weight: [c] float32.
        divisor: of the logits.
        of_state: whether the gradient of the states is wanted.
        of_head: whether that of the head is.
    """
    logits = F.linear(x, factor)
    logits = (logits if divisor == 1.0 else logits / divisor).float()
    if torch.compiler.is_compiling():  # a compiler fuses what it need not change in place
        each, of_logits = _fusible(logits, target)
    else:
        each, of_logits = _in_place(logits, target, of_state or of_head)
    if not (of_state or of_head):
        return Chunk(each, None, None)
    # float16 would round many small probabilities to zero.
    back = torch.float32 if factor.dtype == torch.float16 else factor.dtype
    of_logits = of_logits.mul_(weight[:, None] / divisor).to(back)
    return Chunk(each, of_logits @ factor.to(back) if of_state else None, of_logits.T @ x.to(back) if of_head else None)


def _fusible(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies [c], and their gradients with respect to the logits [c, V]."""
    log_probabilities = logits - logits.logsumexp(-1, keepdim=True)
    hit = torch.arange(logits.shape[-1], device=logits.device) == target[:, None]
    return -log_probabilities.gather(1, target[:, None])[:, 0], log_probabilities.exp() - hit.float()


def _in_place(logits: Tensor, target: Tensor, gradients: bool) -> tuple[Tensor, Tensor]:
    """The same in the memory of the logits."""
    log_probabilities = logits.sub_(logits.logsumexp(-1, keepdim=True))
    each = -log_probabilities.gather(1, target[:, None])[:, 0]
    if gradients:
        log_probabilities.exp_()[torch.arange(len(logits), device=logits.device), target] -= 1
    return each, log_probabilities


@lru_cache(maxsize=1)
def _compiled_chunk_loss() -> Callable[..., Chunk]:
    return compiled(chunk_loss, dynamic=False)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, state: Tensor, head: Tensor, target: Tensor, weight: Tensor, divisor: float,
        dtype: torch.dtype | None, wanted: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total = torch.zeros((), dtype=torch.float32, device=state.device)
        each = torch.empty(len(target), dtype=torch.float32, device=state.device)
        of_state = torch.empty_like(state) if wanted and ctx.needs_input_grad[0] else None
        of_head = torch.zeros_like(head, dtype=torch.float32) if wanted and ctx.needs_input_grad[1] else None
        # Chunks of one shape are compiled once; on a device all but those of a user's own index are.
        compute = _compiled_chunk_loss() if state.is_cuda else chunk_loss
        with torch.autocast(state.device.type, enabled=False):
            factor, size = head if dtype is None else head.to(dtype), chunk_size(len(head), state.device)
            for start in range(0, len(target), size):
                rows = slice(start, start + size)
                found = compute(
                    state[rows].to(factor.dtype), factor, target[rows], weight[rows].float(), divisor,
                    of_state is not None, of_head is not None,
                )  # fmt: skip
                each[rows] = found.each
                total += found.each @ weight[rows].float()
                if of_state is not None and found.of_state is not None:
                    of_state[rows] = found.of_state.to(state.dtype)
                if of_head is not None and found.of_head is not None:
                    of_head += found.of_head
        ctx.found = of_state, of_head
        ctx.head_type = head.dtype
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.found is None:
            raise RuntimeError("the gradient of token_loss can be taken once; compute the loss again for a second one")
        of_state, of_head = ctx.found
        ctx.found = None
        with torch.no_grad():
            of_state = None if of_state is None else of_state.mul_(grad)
            of_head = None if of_head is None else of_head.mul_(grad).to(ctx.head_type)
        return of_state, of_head, None, None, None, None, None
