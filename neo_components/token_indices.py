"""Indices of a batch's tokens, found on the CPU: a step on a device never has to wait for an answer of the device.

Which tokens are targets and which belong to images decides the sizes of tensors. A batch is made on the CPU, where this
is known, and takes it along to its device: as indices, padded to one length for all batches of a shape, and as plain
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """The location of one document: index of its packed sequence and of its first token, and its length."""

    sequence: int
    start: int
    length: int


def document_spans(document_ids: Tensor) -> list[Span]:
    """The runs of equal document ids of [B, L], sequence by sequence; padding (``-1``) is left out."""
    spans = []
    for sequence, ids in enumerate(document_ids.numpy(force=True)):
        starts = np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1))
        lengths = np.diff(starts, append=len(ids))
        spans += [
            Span(sequence, start, length)
            for start, length, number in zip(starts.tolist(), lengths.tolist(), ids[starts].tolist(), strict=True)
            if number >= 0
        ]
    return spans


MULTIPLE = 2048
"""Multiple to which indices are padded: the tokens that a device computes the loss of together."""


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, for which the CPU does not wait: it goes there from page-locked memory."""
    real = torch.cuda.is_available() and torch._guards.detect_fake_mode(x) is None
    if device.type == "cuda" and real and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(frozen=True)
class Index:
    """Some tokens of a batch.

    Args:
        padded: [B * L, rounded up to a :data:`MULTIPLE`] int64 on the batch's device: their indices in the flattened
            batch, in order, then 0.
        count: how many they are.
    """

    padded: Tensor
    count: int

    @classmethod
    def of(cls, chosen: Tensor) -> Index:
        """From [B, L] bool on the CPU."""
        mask = chosen.numpy()
        found = np.flatnonzero(mask)
        padded = np.zeros(-(-mask.size // MULTIPLE) * MULTIPLE, dtype=np.int64)
        padded[: len(found)] = found
        return cls(torch.from_numpy(padded), len(found))

    @property
    def exact(self) -> Tensor:
        """[count] int64."""
        return self.padded[: self.count]

    @property
    def filled(self) -> Tensor:
        """[n] int64, n the next :data:`MULTIPLE`: few different lengths, for compiled code."""
        return self.padded[: -(-self.count // MULTIPLE) * MULTIPLE]

    def map(self, change: Callable[[Tensor], Tensor]) -> Index:
        """The same with the tensor changed, for example moved."""
        return Index(change(self.padded), self.count)


class TokenIndices:
    """Indices of the tokens of a batch, or of the part of it that passes the pre-Buffer.

    Args:
        ids: the batch's columns on the CPU, [B, L] each: ``document_ids``, ``image_ids``, ``token_kinds`` and the like.
        indices: by name, on the batch's device.
    """

    def __init__(self, ids: Mapping[str, Tensor], indices: Mapping[str, Index]) -> None:
        self.ids = ids
        self.indices = indices

    @property
    def targets(self) -> Index:
        """Tokens that are targets; the token before each predicts it."""
        return self.indices["targets"]

    @property
    def visual(self) -> Index:
        """Tokens that the patch embedding gives."""
        return self.indices["visual"]

    @cached_property
    def spans(self) -> list[Span]:
        """The documents."""
        return document_spans(self.ids["document_ids"])

    def map(self, change: Callable[[Tensor], Tensor]) -> dict[str, Index]:
        """The indices with every tensor changed, for example moved."""
        return {name: index.map(change) for name, index in self.indices.items()}
