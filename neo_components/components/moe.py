"""Mixture of experts: a router sends each token to a few of several gated feed-forwards.

Source: Qwen3-MoE (softmax over all experts, then the likeliest); Shazeer et al. 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neo_components.components.block_inputs import BlockInputs
from neo_components.components.layers import activation_of
from neo_components.components.recompute import autocast_type
from neo_components.errors import ArgumentError


class Experts(nn.Module):
    """The weights of X gated feed-forwards without biases, stacked.

    Args:
        hidden_size: D.
        expert_size: width F between the projections of one expert.
        num_experts: X.
    """

    def __init__(self, hidden_size: int, expert_size: int, num_experts: int) -> None:
        super().__init__()
        # Per expert: the rows of gate, then those of up.
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, expert_size))
        self.reset(0.02)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Draws all weights from normal(0, std)."""
        self.gate_up_proj.normal_(0.0, std)
        self.down_proj.normal_(0.0, std)


class SparseFeedForward(nn.Module):
    """Each token passes the ``experts_per_token`` likeliest of its experts; their outputs are added by probability.

    No load-balancing loss is added: what trains the experts must keep them busy.

    Args:
        hidden_size: D.
        expert_size: width between the projections of one expert.
        num_experts: X.
        experts_per_token: how many a token uses, at most X.
        normalize_experts: divide a token's probabilities by the sum over the chosen experts.
        activation: ``silu`` or ``gelu_tanh``.

    Raises:
        ValueError: if a token is to use more experts than there are, or the activation is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_size: int,
        num_experts: int,
        experts_per_token: int,
        normalize_experts: bool = True,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if not 1 <= experts_per_token <= num_experts:
            raise ArgumentError(
                "experts_per_token", f"must lie in 1 to num_experts ({num_experts}), got {experts_per_token}"
            )
        self.experts_per_token = experts_per_token
        self.normalize = normalize_experts
        self.activation = activation_of(activation)
        self.gate = nn.Linear(hidden_size, num_experts, bias=False)
        self.experts = Experts(hidden_size, expert_size, num_experts)

    def forward(self, x: Tensor, inputs: BlockInputs | None = None) -> Tensor:
        """x [..., D] -> [..., D]; the router reads x alone, not ``inputs``."""
        tokens = x.reshape(-1, x.shape[-1])
        if not len(tokens):
            return x * 0.0
        weights, chosen = self.route(tokens)
        # Slots sorted by expert, so that each expert reads one run of tokens.
        experts, order = chosen.flatten().sort(stable=True)
        rows = order // self.experts_per_token
        found = self._all_at_once(tokens[rows], experts) if self.grouped(x) else self._one_by_one(tokens[rows], chosen)
        weighted = found * weights.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, rows, weighted.to(tokens.dtype)).view_as(x)

    def grouped(self, x: Tensor) -> bool:
        """Whether one kernel computes all experts, which takes bfloat16 and rows of a multiple of 16 bytes. Otherwise
        one expert follows the other, and a device is asked how many tokens each gets."""
        widths = (x.shape[-1], self.experts.down_proj.shape[-1])
        return (autocast_type(x) or x.dtype) == torch.bfloat16 and all(width % 8 == 0 for width in widths)

    def _all_at_once(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [slots, D], and the expert of each slot in ascending order."""
        numbers = torch.arange(self.gate.out_features, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        into, out = (w.to(torch.bfloat16).transpose(1, 2) for w in (self.experts.gate_up_proj, self.experts.down_proj))
        gate, up = F.grouped_mm(x.to(torch.bfloat16), into, offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(self.activation(gate) * up, out, offs=ends)

    def _one_by_one(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x [slots, D] in the order of their experts; chosen [n, experts_per_token]."""
        parts = x.split(self.tokens_of(chosen))
        return torch.cat([self._expert(number, part) for number, part in enumerate(parts) if part.shape[0] > 0])

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [n, D] -> weights and numbers of the chosen experts, each [n, experts_per_token]."""
        scores = self.gate(tokens)
        # The softmax is float32 whatever the model's type; experts are chosen by what it gives.
        weights, chosen = scores.softmax(-1, dtype=torch.float32).topk(self.experts_per_token)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(scores.dtype), chosen

    def tokens_of(self, chosen: Tensor) -> list[int]:
        """Chosen experts [n, experts_per_token] -> how many tokens each expert gets."""
        return chosen.flatten().bincount(minlength=self.gate.out_features).tolist()

    def _expert(self, number: int, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.experts.gate_up_proj[number]).chunk(2, dim=-1)
        return F.linear(self.activation(gate) * up, self.experts.down_proj[number])
