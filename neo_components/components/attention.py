"""Native attention: queries and keys carry T, H and W channels, each with its own norm and rotation.

Source: NEO paper section 3.1 and equation 2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neo_components.components.backends import Attend
from neo_components.components.layers import RMSNorm
from neo_components.components.rotary import rotate


class NativeAttention(nn.Module):
    """Grouped-query attention whose heads are 2E wide in queries and keys (T: E, H: E/2, W: E/2) and E in values.

    Order: project, split, norm, rotate, score. The scale stays ``1/sqrt(E)``, that of the language model.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K, divides N.
        head_width: E, a multiple of 4.
        norm_eps: of the query and key norms.

    Raises:
        ValueError: if K does not divide N.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_width: int, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        self.head_width = head_width
        self.scale = head_width**-0.5
        queries, keys = num_heads * head_width, num_kv_heads * head_width
        self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, hidden_size, bias=False)
        self.q_norm = RMSNorm(head_width, norm_eps)
        self.k_norm = RMSNorm(head_width, norm_eps)
        # Per head: H channels, then W channels.
        self.q_proj_hw = nn.Linear(hidden_size, queries, bias=False)
        self.k_proj_hw = nn.Linear(hidden_size, keys, bias=False)
        self.q_norm_h = RMSNorm(head_width // 2, norm_eps)
        self.q_norm_w = RMSNorm(head_width // 2, norm_eps)
        self.k_norm_h = RMSNorm(head_width // 2, norm_eps)
        self.k_norm_w = RMSNorm(head_width // 2, norm_eps)

    def hw_modules(self) -> list[nn.Module]:
        """The parts that NEO adds to a language model's attention: H/W projections and norms."""
        return [self.q_proj_hw, self.k_proj_hw, self.q_norm_h, self.q_norm_w, self.k_norm_h, self.k_norm_w]

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """Attention over x.

        Args:
            x: [B, L, D].
            rotary: cosines and sines, [B, L, 1, E] each.
            attend: prepared backend.

        Returns:
            [B, L, D].
        """
        q = self._heads(self.q_proj(x), self.q_proj_hw(x), self.q_norm, self.q_norm_h, self.q_norm_w, rotary)
        k = self._heads(self.k_proj(x), self.k_proj_hw(x), self.k_norm, self.k_norm_h, self.k_norm_w, rotary)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_width))
        return self.o_proj(attend(q, k, v, self.scale).flatten(-2))

    def _heads(
        self,
        t: Tensor,
        hw: Tensor,
        norm: nn.Module,
        norm_h: nn.Module,
        norm_w: nn.Module,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Queries or keys: [B, L, heads * E] of T and of H/W -> [B, L, heads, 2E], normed and rotated."""
        t = t.unflatten(-1, (-1, self.head_width))
        h, w = hw.unflatten(-1, (-1, self.head_width)).chunk(2, dim=-1)
        return rotate([norm(t), norm_h(h), norm_w(w)], *rotary)

    @torch.no_grad()
    def init_hw_from_t(self) -> None:
        """Starts the H/W channels of a pretrained attention so that their score is exactly zero.

        Keys are zero. Queries are taken from the T query: of each head's E rows, in four quarters, the first and
        the third (the rotate-half partners of the fastest E/4 frequencies), once for H and once for W. Norms are 1.
        Source: released NEO code.
        """
        quarters = self.q_proj.weight.unflatten(0, (-1, 4, self.head_width // 4))
        half = quarters[:, [0, 2]]
        self.q_proj_hw.weight.copy_(torch.cat([half, half], dim=1).flatten(0, 2))
        self.k_proj_hw.weight.zero_()
        for norm in (self.q_norm_h, self.q_norm_w, self.k_norm_h, self.k_norm_w):
            norm.weight.fill_(1.0)
