"""FlexAttention (Dong et al. 2024, arXiv 2412.05496) in the form that torch's kernels take.

Read off the kernels of torch 2.11 and 2.14 (``torch/_inductor/kernel/flex``): grouped heads are theirs
(``enable_gqa``), and values may be narrower than queries and keys, forward and backward, so nothing is repeated or
padded for 2E on E. A width that is no power of two is computed on the next power and masked. A width below 16 is
refused, as a matrix product of their tiles needs 16: those heads are padded here.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neo_components.components.compiling import compiled
from neo_components.components.document_attention import HALF
from neo_components.components.masks import RuleName, block_mask
from neo_components.token_indices import TokenIndices

LEAST = 16
"""Least width of a head that the kernels take."""

WIDE = 128
"""Widest queries for which torch's own tiles of the backward pass fit the registers of a Hopper GPU."""
WIDE_TILES = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 8}
"""Tiles of the backward pass for wider ones on Hopper, in half precision.

Torch's are 64 x 64 with 4 warps, too large for the registers of a thread. ``tests/test_sm90.py`` compiles these for a
Hopper GPU (2E = 256, E = 128, 16 and 8 heads, bfloat16) and bounds what does not fit. Not timed on a GPU.
"""


def flex_attention() -> Any:
    """Torch's FlexAttention, which is slow to import."""
    from torch.nn.attention.flex_attention import flex_attention as flex

    return flex


@lru_cache(maxsize=1)
def compiled_flex_attention() -> Any:
    """FlexAttention compiled, for blocks that are not compiled.

    A second length of sequences compiles it for all lengths. As one graph: torch would go on with the whole matrix of
    scores otherwise.
    """
    return compiled(flex_attention())


class FlexAttention:
    """FlexAttention with a BlockMask over the packed sequence; compiled on CUDA, eager (forward only) on CPU.

    Arguments as in :class:`~neo_components.components.document_attention.SpanAttention`. A call raises ValueError if a
    gradient is required on CPU.
    """

    def __init__(
        self,
        document_ids: Tensor,
        image_ids: Tensor,
        rule: str | RuleName = "mixed",
        window: int | None = None,
        token_kinds: Tensor | None = None,
        known: TokenIndices | None = None,
    ) -> None:
        self.mask = block_mask(document_ids, image_ids, rule, window, token_kinds=token_kinds)
        self.hopper = is_hopper(document_ids.device)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if not q.is_cuda and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ValueError("FlexAttention has no backward on CPU; use attention backend 'sdpa' for training there")
        width, grouped = v.shape[-1], q.shape[2] != k.shape[2]
        q, k, v = (at_least(x, LEAST).transpose(1, 2) for x in (q, k, v))
        flex = flex_attention() if torch.compiler.is_compiling() or not q.is_cuda else compiled_flex_attention()
        tiles = WIDE_TILES if self.hopper and q.shape[-1] > WIDE and q.dtype in HALF else None
        out = flex(q, k, v, block_mask=self.mask, scale=scale, enable_gqa=grouped, kernel_options=tiles)
        return out[..., :width].transpose(1, 2)


def at_least(x: Tensor, width: int) -> Tensor:
    """x [..., C] with zeros behind its channels up to ``width``; they change no product of a query and a key."""
    return x if x.shape[-1] >= width else F.pad(x, (0, width - x.shape[-1]))


def is_hopper(device: torch.device) -> bool:
    """Whether a device is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) == (9, 0)
