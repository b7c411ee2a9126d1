"""Bridges between the width of a pre-Buffer and that of another language model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neo_components.components.component import Component

FOLDS = 5
"""In so many parts pairs are left out to tell how well a rotation fits them."""


class Bridge(Component):
    """An affine map between two widths.

    Args:
        in_width: width of what comes in.
        out_width: width of what goes out.

    Starts as normal(0, 1/sqrt(in_width)) with zero bias; :meth:`fit` or :meth:`fit_orthogonal` sets it from pairs of
    vectors.

    Attributes:
        unexplained: what the last fit returned; ``None`` before one. Not kept on disk.
        unexplained_left_out: the same share for pairs that a fit has not seen. Far above ``unexplained`` it says that
            the fit holds for the tokens that both know and for no others: with fewer pairs than ``in_width`` a fit
            explains all that it has seen.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.unexplained: float | None = None
        self.unexplained_left_out: float | None = None
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

        Source: Hoerl and Kennard 1970 (ridge regression); Allen 1974 (PRESS: errors of left-out pairs from one fit).
        """
        x, y, x_mean, y_mean = _centred(source, target)
        spread, axes = torch.linalg.eigh(x.T @ x)
        along = x @ axes
        shrunk = 1 / (spread.clamp(min=0) + ridge * spread.mean())
        weight = shrunk[:, None] * (along.T @ y)
        missed = y - along @ weight
        own = (along.square() * shrunk).sum(1) + 1 / len(x)  # what each pair contributes to its own prediction
        left_out = missed / (1 - own).clamp(min=1e-9)[:, None]
        return self._set(axes @ weight, x_mean, y_mean, _share(missed, y), _share(left_out, y))

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
        turn = _turn(x, y)
        left_out = torch.empty_like(y)
        folds = torch.arange(len(x)) % FOLDS
        for fold in range(FOLDS):
            out = folds == fold
            x_kept, y_kept, x_middle, y_middle = _centred(x[~out], y[~out])
            left_out[out] = y[out] - y_middle - (x[out] - x_middle) @ _turn(x_kept, y_kept)
        return self._set(turn, x_mean, y_mean, _share(y - x @ turn, y), _share(left_out, y))

    def _set(self, weight: Tensor, x_mean: Tensor, y_mean: Tensor, unexplained: float, left_out: float) -> float:
        """Takes over a fit of centred pairs; returns what it leaves unexplained."""
        self.proj.weight.copy_(weight.T)
        self.proj.bias.copy_(y_mean - x_mean @ weight)
        self.unexplained, self.unexplained_left_out = unexplained, left_out
        return unexplained


def _share(missed: Tensor, y: Tensor) -> float:
    return float(missed.square().sum() / y.square().sum())


def _turn(x: Tensor, y: Tensor) -> Tensor:
    """The nearest rotation with its scale, of centred pairs."""
    u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
    turn = u @ v
    turned = x @ turn
    return turn * (turned * y).sum() / turned.square().sum()


def _centred(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both in double precision without their means, and the means."""
    x, y = source.double(), target.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    return x - x_mean, y - y_mean, x_mean, y_mean
