"""Native attention: queries and keys carry T, H and W channels, each with its own norm and rotation.

Each property in which language models differ (biases, norm of the T channels, scale, how many T channels rotate) is a
flat argument; the H and W channels are the same in all of them.

Source: NEO paper section 3.1 and equation 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from neo_components.components.block_inputs import BlockInputs
from neo_components.components.layers import RMSNorm
from neo_components.components.rotary import rotate
from neo_components.errors import ArgumentError, one_of

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
        rotary_width: how many T channels rotate; ``None``: all.

    Raises:
        ArgumentError: (a ``ValueError``) if K does not divide N, or ``qk_norm`` is unknown.
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
            raise ArgumentError(
                "num_kv_heads", f"must divide num_heads, got {num_kv_heads} and {num_heads}", "num_heads"
            )
        one_of("qk_norm", qk_norm, QK_NORMS)
        self.head_width = head_width
        self.scale = head_width**-0.5 if attention_scale is None else attention_scale
        self.qk_norm = qk_norm
        rotated = rotary_width or head_width
        self.t_widths = [rotated, head_width - rotated] if rotated < head_width else [head_width]
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

    @property
    def q_norms(self) -> list[RMSNorm]:
        """Norms of the queries' H, W and T channels; the last is missing where T has none."""
        return [self.q_norm_h, self.q_norm_w, *([self.q_norm] if self.qk_norm != "none" else [])]

    @property
    def k_norms(self) -> list[RMSNorm]:
        """The same of the keys."""
        return [self.k_norm_h, self.k_norm_w, *([self.k_norm] if self.qk_norm != "none" else [])]

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Attention over x.

        Args:
            x: [B, L, D].
            inputs: rotary tables and the attention backend.

        Returns:
            [B, L, D].
        """
        q = self.rotated(self.q_proj(x), self.q_proj_hw(x), self.q_norms, inputs)
        k = self.rotated(self.k_proj(x), self.k_proj_hw(x), self.k_norms, inputs)
        v = self.heads(self.v_proj(x))
        return self.o_proj(inputs.attend(q, k, v, self.scale).flatten(-2))

    def rotated(self, t: Tensor, hw: Tensor, norms: Sequence[Norm], inputs: BlockInputs) -> Tensor:
        """Queries or keys, ``rotate(norm(projection))``.

        Args:
            t: [B, L, heads * E], the projection to T channels.
            hw: [B, L, heads * E], that to H and W channels.
            norms: of H, of W, and of T where it has one.
            inputs: rotary tables.

        Returns:
            [B, L, heads, 2E].
        """
        norm_h, norm_w, *norm_t = norms
        h, w = self.heads(hw).chunk(2, dim=-1)
        if self.qk_norm == "whole":
            t = self.heads(norm_t[0](t))
        else:
            t = self.heads(t) if self.qk_norm == "none" else norm_t[0](self.heads(t))
        return rotate([*t.split(self.t_widths, dim=-1), norm_h(h), norm_w(w)], *inputs.rotary)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * E] -> [B, L, heads, E]."""
        return x.unflatten(-1, (-1, self.head_width))

    def hw_modules(self) -> list[nn.Module]:
        """The parts that NEO adds to a language model's attention: H/W projections and norms."""
        return [self.q_proj_hw, self.k_proj_hw, self.q_norm_h, self.q_norm_w, self.k_norm_h, self.k_norm_w]

    @torch.no_grad()
    def init_hw_from_t(self) -> None:
        """Starts the H/W channels of a pretrained attention so that their score is exactly zero.

        Keys are zero. Queries are taken from the T query: of each head's E rows those of the first E/4 pairs, the ones
        that rotate fastest, once for H and once for W. Where all T channels rotate these are the first and the third
        quarter. Norms are 1. Source: released NEO code.
        """
        rows, start = [], 0
        for width in self.t_widths:
            first = torch.arange(start, start + width // 2, device=self.q_proj.weight.device)
            rows.append(torch.stack([first, first + width // 2], dim=1))
            start += width
        fastest = torch.cat(rows)[: self.head_width // 4].T.flatten()
        half = self.q_proj.weight.unflatten(0, (-1, self.head_width))[:, fastest]
        self.q_proj_hw.weight.copy_(torch.cat([half, half], dim=1).flatten(0, 1))
        self.k_proj_hw.weight.zero_()
        for norm in (self.q_norm_h, self.q_norm_w, self.k_norm_h, self.k_norm_w):
            norm.weight.fill_(1.0)
