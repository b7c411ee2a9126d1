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

    Starts as normal(0, 1/sqrt(in_width)) with zero bias; :meth:`fit` sets it from pairs of vectors.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
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
        x, y = source.double(), target.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        x, y = x - x_mean, y - y_mean
        gram = x.T @ x
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + penalty, x.T @ y)
        self.proj.weight.copy_(weight.T)
        self.proj.bias.copy_(y_mean - x_mean @ weight)
        return float((y - x @ weight).square().sum() / y.square().sum())
