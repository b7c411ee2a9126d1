"""FlashAttention over documents of different lengths (Dao 2023, arXiv 2307.08691), for plain causal masks.

It knows no mask, so it serves the rule ``causal``, and ``mixed`` in batches without images. Its kernels take half
precision, one width for queries, keys and values, and at most 256: values are padded from E to 2E, which doubles what
their product costs; FlexAttention does not need that.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from neo_components.components.document_attention import HALF
from neo_components.components.flex_attention import at_least
from neo_components.components.masks import RuleName
from neo_components.registry import MASKS
from neo_components.token_indices import Span, TokenIndices, document_spans, sent
from neo_components.types import NO_IMAGE

WIDEST = 256
"""Widest queries that FlashAttention takes."""

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int], Tensor]
"""``kernel(q [n, N, C], k [n, K, C], v [n, K, C], starts [documents + 1] int32, longest, scale, window)`` -> [n, N, C],
causal inside each document; ``window``: how many earlier tokens a query attends to, -1: all."""


class VarlenAttention:
    """FlashAttention inside each document of a packed sequence.

    Args:
        document_ids: [B, L].
        image_ids: [B, L].
        rule: registered name of the mask rule.
        window: how many tokens back a query attends (``masks.rule_of``); ``None``: all.
        token_kinds: ignored; a batch without images has no other kinds.
        known: what the CPU knows of the tokens; without it the device is asked where documents and images are.
        kernel: ``None``: that of torch, or of the package flash-attn.

    Raises:
        ValueError: if the mask is not plain causal order in this batch, or the kernel does not run here.
    """

    def __init__(
        self,
        document_ids: Tensor,
        image_ids: Tensor,
        rule: str | RuleName = "mixed",
        window: int | None = None,
        token_kinds: Tensor | None = None,
        known: TokenIndices | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        device = document_ids.device
        self.kernel = flash_kernel(device) if kernel is None else kernel
        images = image_ids if known is None else known.ids["image_ids"]
        if problem := not_causal(rule, window, bool((images != NO_IMAGE).any())):
            raise ValueError(f"attention backend 'varlen' computes plain causal order only, and {problem}; use 'flex'")
        spans = document_spans(document_ids) if known is None else known.spans
        starts = starts_of(spans, *document_ids.shape)
        self.longest = max((end - start for start, end in pairwise(starts)), default=0)
        self.starts = sent(torch.tensor(starts, dtype=torch.int32, device="cpu"), device)
        self.window = -1 if window is None else window - 1

    @torch.compiler.disable
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The number of documents differs from batch to batch, so a compiler would compile this again for every one."""
        if q.dtype not in HALF:
            raise ValueError(
                f"attention backend 'varlen' computes in bfloat16 or float16, got {q.dtype}; set trainer.precision to "
                "bf16-mixed or model.dtype to bfloat16, or use 'flex'"
            )
        if q.shape[-1] > WIDEST:
            raise ValueError(
                f"attention backend 'varlen' takes queries up to {WIDEST} wide, got {q.shape[-1]} (twice the width of "
                "a head); use 'flex'"
            )
        count, width = q.shape[0], v.shape[-1]
        q, k, v = (x.flatten(0, 1) for x in (q, k, at_least(v, q.shape[-1])))
        out = self.kernel(q, k, v, self.starts, self.longest, scale, self.window)
        return out[..., :width].unflatten(0, (count, -1))


def not_causal(rule: str | RuleName, window: int | None, images: bool) -> str:
    """Why a mask is not plain causal order inside documents; empty if it is.

    Args:
        rule: registered name; a rule with ``pairs_inside`` is causal outside of images (``mask_rules.py``).
        window: of the layer.
        images: whether the batch has any.
    """
    name = rule if isinstance(rule, str) else rule.name
    pairs = getattr(MASKS[name], "pairs_inside", None)
    if pairs is None:
        return f"nothing is known of the mask rule {name!r}"
    if images and pairs(3) != 6:
        return f"the mask rule {name!r} is not causal inside the images of this batch"
    if images and window is not None:
        return f"a window of {window} does not cut through the images of this batch"
    return ""


def starts_of(spans: list[Span], count: int, length: int) -> list[int]:
    """Where documents start in the flattened batch, and its end; a run of padding counts as a document."""
    ends = {span.sequence * length + span.start + span.length for span in spans}
    starts = {span.sequence * length + span.start for span in spans}
    return sorted({*starts, *ends, *range(0, count * length + 1, length)})


def flash_kernel(device: torch.device) -> Kernel:
    """FlashAttention as torch brings it along, or else the package flash-attn.

    Raises:
        ValueError: if neither runs here.
    """
    if device.type != "cuda":
        raise ValueError(
            "attention backend 'varlen' (FlashAttention; model.backend in a recipe) needs a GPU, got "
            f"{device.type}; use 'auto'"
        )
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        parameters = inspect.signature(varlen_attn).parameters
        if {"scale", "window_size"} <= parameters.keys():  # not yet in torch 2.10
            grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters else {}
            return partial(_by_torch, partial(varlen_attn, **grouped))
    if importlib.util.find_spec("flash_attn") is not None:
        return partial(_by_flash_attn, importlib.import_module("flash_attn").flash_attn_varlen_func)
    raise ValueError(
        f"attention backend 'varlen': torch {torch.__version__} has no varlen_attn with a scale, and the package "
        "flash-attn is not installed; use torch 2.11 or later, or 'flex'"
    )


def _by_torch(
    varlen: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    return varlen(q, k, v, starts, starts, longest, longest, scale=scale, window_size=(window, 0))


def _by_flash_attn(
    varlen: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, window: int
) -> Tensor:
    return varlen(q, k, v, starts, starts, longest, longest, softmax_scale=scale, causal=True, window_size=(window, 0))
