"""Small layers shared by all components: the norm and the gated feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32 whatever the input's type.

    Args:
        width: size of the last axis.
        eps: added to the mean square.

    Source: Zhang and Sennrich 2019; as in Qwen3.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape and type."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedFeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases (SwiGLU; Shazeer 2020).

    Args:
        hidden_size: D.
        feed_forward_size: width between the projections.
    """

    def __init__(self, hidden_size: int, feed_forward_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, feed_forward_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, feed_forward_size, bias=False)
        self.down_proj = nn.Linear(feed_forward_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
