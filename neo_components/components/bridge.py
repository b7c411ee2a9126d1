"""Bridges between the width of a pre-Buffer and that of another language model.

A bridge is registered in ``BRIDGES``: a component with ``in_width`` and ``out_width`` and its own options. One that has
a method ``fit(source, target)`` is fitted on the word embeddings of shared tokens when it is attached. A registered
function that returns ``None`` means that no bridge is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.component import Component
from neo_components.registry import BRIDGES, KIND, Choice, split

FOLDS = 5
"""Number of folds of the cross-validation that measures how well a rotation fits left-out pairs."""


@BRIDGES.register("identity")
def identity(in_width: int, out_width: int) -> None:
    """No bridge.

    Raises:
        ValueError: if the widths differ.
    """
    if in_width != out_width:
        raise ValueError(
            f"bridge 'identity' needs equal widths, got {in_width} and {out_width}; choose another bridge, for example "
            "'least_squares'"
        )


@BRIDGES.register("random")
class Bridge(Component):
    """An affine map between two widths that starts as normal(0, 1/sqrt(in_width)) with zero bias.

    Args:
        in_width: width of what comes in.
        out_width: width of what goes out.

    Attributes:
        unexplained: the fraction of the target's variance that the last fit left unexplained, 0 (exact) to 1 (no better
            than the mean); ``None`` before a fit. Not saved.
        unexplained_left_out: the same fraction for pairs that were left out of the fit. A value far above
            ``unexplained`` means that the fit holds for the shared tokens only: with fewer pairs than ``in_width`` a
            fit explains all of its own pairs.
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

    def _set(self, weight: Tensor, x_mean: Tensor, y_mean: Tensor, unexplained: float, left_out: float) -> None:
        """Takes over a fit of centered pairs."""
        self.proj.weight.copy_(weight.T)
        self.proj.bias.copy_(y_mean - x_mean @ weight)
        self.unexplained, self.unexplained_left_out = unexplained, left_out


@BRIDGES.register("least_squares")
class LeastSquares(Bridge):
    """A bridge that is fitted by least squares with a ridge penalty.

    Args:
        in_width: width of what comes in.
        out_width: width of what goes out.
        ridge: penalty relative to the mean variance of the source.

    Source: Hoerl and Kennard 1970 (ridge regression); Allen 1974 (PRESS: errors of left-out pairs from one fit).
    """

    def __init__(self, in_width: int, out_width: int, ridge: float = 1e-3) -> None:
        super().__init__(in_width, out_width)
        self.save_hyperparameters()

    @torch.no_grad()
    def fit(self, source: Tensor, target: Tensor) -> None:
        """Fits paired vectors, source [n, in_width] and target [n, out_width]."""
        x, y, x_mean, y_mean = _centered(source, target)
        spread, axes = torch.linalg.eigh(x.T @ x)
        along = x @ axes
        shrunk = 1 / (spread.clamp(min=0) + self.hparams.ridge * spread.mean())
        weight = shrunk[:, None] * (along.T @ y)
        missed = y - along @ weight
        own = (along.square() * shrunk).sum(1) + 1 / len(x)  # what each pair contributes to its own prediction
        left_out = missed / (1 - own).clamp(min=1e-9)[:, None]
        self._set(axes @ weight, x_mean, y_mean, _share(missed, y), _share(left_out, y))


@BRIDGES.register("orthogonal")
class Orthogonal(Bridge):
    """A bridge that is fitted as the rotation, with one scale, that brings paired vectors nearest: angles stay as they
    are, so nothing that the source distinguishes is lost if the target is as wide.

    Args:
        in_width: width of what comes in.
        out_width: width of what goes out.

    Source: Schoenemann 1966 (orthogonal Procrustes); Smith et al. 2017 (arXiv 1702.03859) for word embeddings.
    """

    @torch.no_grad()
    def fit(self, source: Tensor, target: Tensor) -> None:
        """Fits paired vectors, source [n, in_width] and target [n, out_width]."""
        x, y, x_mean, y_mean = _centered(source, target)
        rotation = _rotation(x, y)
        left_out = torch.empty_like(y)
        folds = torch.arange(len(x), device=x.device) % FOLDS
        for fold in range(FOLDS):
            out = folds == fold
            x_kept, y_kept, x_middle, y_middle = _centered(x[~out], y[~out])
            left_out[out] = y[out] - y_middle - (x[out] - x_middle) @ _rotation(x_kept, y_kept)
        self._set(rotation, x_mean, y_mean, _share(y - x @ rotation, y), _share(left_out, y))


def make_bridges(choice: Choice, inner: int, outer: int, words_pass: bool) -> tuple[Any, Any]:
    """The bridges around a pre-Buffer; ``None`` where there is none.

    Args:
        choice: of ``BRIDGES``.
        inner: width of the pre-Buffer.
        outer: width of the language model.
        words_pass: whether words pass the pre-Buffer, and so need a bridge into it.

    Returns:
        From the language model's width into the pre-Buffer, and out of it.
    """
    bridge_in = BRIDGES.make(choice, in_width=outer, out_width=inner) if words_pass else None
    return bridge_in, BRIDGES.make(choice, in_width=inner, out_width=outer)


def bridge_config(bridge: Component | None) -> dict[str, Any] | None:
    """A bridge's arguments as config.json holds them; one that starts at random needs no ``kind``."""
    if bridge is None:
        return None
    name = BRIDGES.name_of(type(bridge))
    return ({} if name == "random" else {KIND: name}) | dict(bridge.hparams)


def bridge_from(config: Mapping[str, Any] | None) -> Any:
    """The inverse of :func:`bridge_config`."""
    if not config:
        return None
    name, arguments = split({KIND: "random", **config})
    return BRIDGES[name](**arguments)


def _share(missed: Tensor, y: Tensor) -> float:
    return float(missed.square().sum() / y.square().sum())


def _rotation(x: Tensor, y: Tensor) -> Tensor:
    """The nearest rotation with its scale, of centered pairs."""
    u, _, v = torch.linalg.svd(x.T @ y, full_matrices=False)
    rotation = u @ v
    rotated = x @ rotation
    return rotation * (rotated * y).sum() / rotated.square().sum()


def _centered(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both in double precision without their means, and the means."""
    x, y = source.double(), target.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    return x - x_mean, y - y_mean, x_mean, y_mean
