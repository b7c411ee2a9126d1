"""The geometry of tokens: their norm, how much of it is a common mean, and in how many directions they vary.

A language model reads a token by its direction and by what distinguishes it from its neighbors. Visual tokens that are
far longer than words, share a mean or vary in one direction are all alike to it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """Scalars of n vectors, float32 on their device.

    Attributes:
        norm: mean L2 norm.
        mean_share: squared norm of the mean vector over the mean squared norm: 0 (centered) to 1 (all equal).
        effective_rank: participation ratio ``(sum v)^2 / sum v^2`` of the eigenvalues v of the covariance: 1 if all
            vectors lie on a line, D if all D directions vary alike; 0 if all vectors are equal.

    Source of the participation ratio: Gao et al. 2017 (bioRxiv 214262), equation 4.
    """

    norm: Tensor
    mean_share: Tensor
    effective_rank: Tensor


def geometry_of(tokens: Tensor) -> Geometry:
    """The geometry of tokens [n, D], n at least 1. Nothing is read back from their device.

    No eigenvalue is computed: their sum is the covariance's trace, and the sum of their squares its squared Frobenius
    norm, that of the smaller of the two Gram matrices.
    """
    x = tokens.detach().double() if tokens.device.type == "cpu" else tokens.detach().float()
    mean = x.mean(0)
    centered = x - mean
    gram = centered @ centered.T if len(x) < x.shape[1] else centered.T @ centered
    total, squares = gram.diagonal().sum(), gram.square().sum()
    share = mean.square().sum() / x.square().sum(1).mean().clamp(min=torch.finfo(x.dtype).tiny)
    rank = total.square() / squares.clamp(min=torch.finfo(x.dtype).tiny)
    return Geometry(x.norm(dim=1).mean().float(), share.float(), rank.float())
