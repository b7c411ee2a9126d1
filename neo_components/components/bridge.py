"""Bridges between the width of a pre-Buffer and that of another language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neo_components.components.component import Component


class Bridge(Component):
    """An affine map between two widths.

    Args:
        in_width: width of what comes in.
        out_width: width of what goes out.

    Starts as normal(0, 1/sqrt(in_width)) with zero bias; :meth:`fit` or :meth:`fit_orthogonal` sets it from pairs of
    vectors.

    Attributes:
        unexplained: what the last fit returned; ``None`` before one. Not kept on disk.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.unexplained: float | None = None
        self.proj = nn.Linear(in_width, out_width)
        nn.init.normal_(self.proj.weight, 0.0, in_width**-0.5)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_width] -> [..., out_width]."""
        return self.proj(x)

    @torch.no_grad()
    def fit(self, source: Tensor, target: Tensor, ridge: float = 1e-3) -> float:
        """Least squares with a ridge penalty from paired vectors.

        Args:
            source: [n, in_width].
            target: [n, out_width].
            ridge: penalty relative to the mean variance of the source.

        Returns:
            The share of the target's variance left unexplained, 0 (exact) to 1 (no better than the mean).
        """
        x, y, x_mean, y_mean = _centred(source, target)
        gram = x.T @ x
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + penalty, x.T @ y)
        return self._set(weight, x, y, y_mean - x_mean @ weight)

    @torch.no_grad()
    def fit_orthogonal(self, source: Tensor, target: Tensor) -> float:
        """The rotation, with one scale, that brings paired vectors nearest: angles stay as they are, so nothing that
        the source tells apart is lost if the target is as wide.

        Args:
            source: [n, in_width].
            target: [n, out_width].

        Returns:
            The share of the target's variance left unexplained.

        Source: Schoenemann 1966 (orthogonal Procrustes); Smith et al. 2017 (arXiv 1702.03859) for word embeddings.
        """
        x, y, x_mean, y_mean = _centred(source, target)
        u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
        turn = u @ v
        turned = x @ turn
        weight = turn * (turned * y).sum() / turned.square().sum()
        return self._set(weight, x, y, y_mean - x_mean @ weight)

    def _set(self, weight: Tensor, x: Tensor, y: Tensor, bias: Tensor) -> float:
        """Takes over a fit of centred pairs; returns what it leaves unexplained."""
        self.proj.weight.copy_(weight.T)
        self.proj.bias.copy_(bias)
        self.unexplained = float((y - x @ weight).square().sum() / y.square().sum())
        return self.unexplained


def _centred(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both in double precision without their means, and the means."""
    x, y = source.double(), target.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    return x - x_mean, y - y_mean, x_mean, y_mean
