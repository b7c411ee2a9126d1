"""The loss at target tokens, in chunks: the logits of all tokens never exist at once, forward or backward.

The gradient with respect to a chunk's logits is known as soon as the logits are. The forward pass turns it into those
of the hidden states and the head at once, so the backward pass recomputes no logit. The idea is that of cut and fused
cross-entropies (Wijmans et al. 2024, arXiv 2411.09009; Hsu et al. 2024, arXiv 2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_components.components.recompute import autocast_type

CHUNK = 256
"""Target tokens whose logits exist at the same time, at least."""
LOGITS = 1 << 23
"""Logits that may exist at the same time where ``CHUNK`` tokens have fewer."""


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
    wanted = torch.is_grad_enabled()
    total, each = _TokenLoss.apply(state, head, target, weight, divisor, autocast_type(state), wanted)
    return total, each


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
        with torch.autocast(state.device.type, enabled=False):
            factor = head if dtype is None else head.to(dtype)
            # float16 would round many small probabilities to zero.
            back = factor.float() if factor.dtype == torch.float16 and wanted else factor
            size = max(CHUNK, LOGITS // len(head))
            for start in range(0, len(target), size):
                rows = slice(start, start + size)
                x = state[rows].to(factor.dtype)
                logits = F.linear(x, factor)
                logits = (logits if divisor == 1.0 else logits / divisor).float()
                of_logits = logits.sub_(logits.logsumexp(-1, keepdim=True))  # log-probabilities, in place
                each[rows] = -of_logits.gather(1, target[rows, None])[:, 0]
                total += each[rows] @ weight[rows].float()
                if of_state is None and of_head is None:
                    continue
                of_logits = of_logits.exp_()
                of_logits[torch.arange(len(x), device=x.device), target[rows]] -= 1
                of_logits = of_logits.mul_(weight[rows, None] / divisor).to(back.dtype)
                if of_state is not None:
                    of_state[rows] = (of_logits @ back).to(state.dtype)
                if of_head is not None:
                    of_head += of_logits.T @ x.to(back.dtype)
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
