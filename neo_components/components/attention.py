"""Native attention: queries and keys carry T, H and W channels, each with its own norm and rotation.

What language models differ in (biases, norm of the T channels, scale, how many T channels turn) is a flat argument; the
H and W channels are the same beside every one of them.

Source: NEO paper section 3.1 and equation 2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from neo_components.components.backends import Attend, attend_over
from neo_components.components.layers import RMSNorm, linears_after
from neo_components.components.rotary import rotate

Norm = Callable[[Tensor], Tensor]

QK_NORMS = ("head", "whole", "none")
"""Norm of the T channels of queries and keys: over each head, over all heads together (OLMo 2), or none."""


class NativeAttention(nn.Module):
    """Grouped-query attention whose heads are 2E wide in queries and keys (T: E, H: E/2, W: E/2) and E in values.

    Order: project, split, norm, rotate, score. The scale is that of the language model, ``1/sqrt(E)`` in most, for the
    T, H and W parts of a score alike. H and W have norms per head and no biases whatever T has: the score of zero keys
    is exactly 0.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K, divides N.
        head_width: E, a multiple of 4.
        norm_eps: of the query and key norms.
        qk_norm: norm of the T channels, ``head``, ``whole`` or ``none``.
        norm: form of the T norms' gain (``layers.RMSNorm``).
        qkv_bias: whether the T projections and the values have a bias.
        output_bias: whether the output projection has one.
        attention_scale: factor of the scores; ``None``: ``1/sqrt(E)``.
        rotary_width: how many T channels turn; ``None``: all.

    Raises:
        ValueError: if K does not divide N, or ``qk_norm`` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        norm_eps: float = 1e-6,
        qk_norm: str = "head",
        norm: str = "weight",
        qkv_bias: bool = False,
        output_bias: bool = False,
        attention_scale: float | None = None,
        rotary_width: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads, got {num_kv_heads} and {num_heads}")
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm must be one of {', '.join(QK_NORMS)}, got {qk_norm!r}")
        self.head_width = head_width
        self.scale = head_width**-0.5 if attention_scale is None else attention_scale
        self.qk_norm = qk_norm
        turning = rotary_width or head_width
        self.t_widths = [turning, head_width - turning] if turning < head_width else None
        queries, keys = num_heads * head_width, num_kv_heads * head_width
        self.q_proj = nn.Linear(hidden_size, queries, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, keys, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, keys, bias=qkv_bias)
        self.o_proj = nn.Linear(queries, hidden_size, bias=output_bias)
        if qk_norm != "none":
            self.q_norm = RMSNorm(queries if qk_norm == "whole" else head_width, norm_eps, norm)
            self.k_norm = RMSNorm(keys if qk_norm == "whole" else head_width, norm_eps, norm)
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

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, norm: nn.Module | None = None
    ) -> Tensor:
        """Attention over x.

        Args:
            x: [B, L, D].
            rotary: cosines and sines, [B, L, 1, E] each.
            attend: prepared backend.
            norm: what x passes first, given here so that its output need not be kept; ``None``: nothing.

        Returns:
            [B, L, D].
        """
        projections = (self.q_proj, self.k_proj, self.v_proj, self.q_proj_hw, self.k_proj_hw)
        q, k, v, q_hw, k_hw = linears_after(norm, x, projections)
        v = v.unflatten(-1, (-1, self.head_width))
        norms = [self.q_norm_h, self.q_norm_w, self.k_norm_h, self.k_norm_w]
        if self.qk_norm != "none":
            norms += [self.q_norm, self.k_norm]

        def turned(q: Tensor, q_hw: Tensor, k: Tensor, k_hw: Tensor, *gains: Tensor) -> tuple[Tensor, Tensor]:
            normed = [partial(norm.by, weight=gain) for norm, gain in zip(norms, gains, strict=True)]
            q_h, q_w, k_h, k_w, *of_t = normed
            q_norm, k_norm = of_t or (None, None)
            return self._heads(q, q_hw, q_norm, q_h, q_w, rotary), self._heads(k, k_hw, k_norm, k_h, k_w, rotary)

        out = attend_over(attend, turned, (q, q_hw, k, k_hw, *(norm.weight for norm in norms)), v, self.scale)
        return self.o_proj(out.flatten(-2))

    def _heads(
        self, t: Tensor, hw: Tensor, norm: Norm | None, norm_h: Norm, norm_w: Norm, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Queries or keys: [B, L, heads * E] of T and of H/W -> [B, L, heads, 2E], normed and rotated."""
        if norm is not None and self.qk_norm == "whole":
            t, norm = norm(t), None
        t = t.unflatten(-1, (-1, self.head_width))
        if norm is not None:
            t = norm(t)
        h, w = hw.unflatten(-1, (-1, self.head_width)).chunk(2, dim=-1)
        parts = [t] if self.t_widths is None else [*t.split(self.t_widths, dim=-1)]
        return rotate([*parts, norm_h(h), norm_w(w)], *rotary)

    @torch.no_grad()
    def init_hw_from_t(self) -> None:
        """Starts the H/W channels of a pretrained attention so that their score is exactly zero.

        Keys are zero. Queries are taken from the T query: of each head's E rows those of the first E/4 pairs, the ones
        that turn fastest, once for H and once for W. Where all T channels turn these are the first and the third
        quarter. Norms are 1. Source: released NEO code.
        """
        rows, start = [], 0
        for width in self.t_widths or [self.head_width]:
            first = torch.arange(start, start + width // 2)
            rows.append(torch.stack([first, first + width // 2], dim=1))
            start += width
        fastest = torch.cat(rows)[: self.head_width // 4].T.flatten()
        half = self.q_proj.weight.unflatten(0, (-1, self.head_width))[:, fastest.to(self.q_proj.weight.device)]
        self.q_proj_hw.weight.copy_(torch.cat([half, half], dim=1).flatten(0, 1))
        self.k_proj_hw.weight.zero_()
        for norm in (self.q_norm_h, self.q_norm_w, self.k_norm_h, self.k_norm_w):
            norm.weight.fill_(1.0)
