"""NEO's patch embedding layer: pixels become visual tokens by two matrix products over the patches of all images.

Source: NEO paper equation 1, ``x_v = Conv2(GELU(Conv1(I)) + PE)``. A convolution whose stride equals its kernel is a
matrix product over cut-out patches, so images of any number and size need neither a loop nor padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neo_components.components.image_embedding import ImageEmbedding, Product
from neo_components.errors import ArgumentError, one_of
from neo_components.registry import PATCH_EMBEDDINGS

POSITIONS = ("rotary", "sincos", "none")


@PATCH_EMBEDDINGS.register("neo")
class PatchEmbedding(ImageEmbedding):
    """Patches to visual tokens.

    Args:
        hidden_size: D, width of the pre-Buffer.
        width: features of a patch, a multiple of 4.
        patch_size: side of a patch in pixels.
        fold: patches per side of a visual token.
        channels: image channels, C.
        position: ``rotary`` rotates the features by column and row (released NEO weights), ``sincos`` adds a fixed
            table (the paper), ``none`` leaves them.
        base: base of the position frequencies.

    Weights start as normal(0, 1/sqrt(fan in)) (unit gain).

    Raises:
        ArgumentError: (a ``ValueError``) if ``position`` is unknown or ``width`` is no multiple of 4.
    """

    each_token_alone = True

    def __init__(
        self,
        hidden_size: int,
        width: int = 1024,
        patch_size: int = 16,
        fold: int = 2,
        channels: int = 3,
        position: str = "rotary",
        base: float = 1e4,
    ) -> None:
        super().__init__()
        one_of("position", position, POSITIONS)
        if width % 4:
            raise ArgumentError("width", f"must be a multiple of 4, half for columns and half for rows, got {width}")
        self.save_hyperparameters()
        self.patch_size, self.fold, self.channels = patch_size, fold, channels
        self.patch_proj = nn.Linear(channels * patch_size**2, width)
        self.token_proj = nn.Linear(fold**2 * width, hidden_size)
        self.group = fold**2
        self.position, self.base = position, base
        for projection in (self.patch_proj, self.token_proj):
            nn.init.normal_(projection.weight, 0.0, projection.in_features**-0.5)
            nn.init.zeros_(projection.bias)

    def forward(self, patches: Tensor, patch_positions: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """Embeds patches.

        Args:
            patches: [P, C * patch_size**2], normalized pixels as (channel, y, x); the ``fold**2`` patches of a visual
                token, row by row, are neighbors (``patchify`` and ``pack`` order them so).
            patch_positions: [P, 2] row and column of each patch in its image.
            image_grids: not needed.

        Returns:
            [P / fold**2, D].
        """
        features = F.gelu(self.patch_proj(patches.to(self.patch_proj.weight.dtype)))
        if self.position != "none":
            angle = self._angles(patch_positions)
            features = (_rotated(features, angle) if self.position == "rotary" else features + _table(angle)).to(
                features.dtype
            )
        return self.token_proj(features.reshape(-1, self.group * features.shape[-1]))

    def products(self, image_grids: Tensor) -> Sequence[Product]:
        """The two projections, over patches and over visual tokens."""
        patches = int(image_grids.prod(-1).sum())
        return [Product.of(patches, self.patch_proj), Product.of(patches // self.group, self.token_proj)]

    @torch.no_grad()
    def whiten(self, patches: Tensor, ridge: float = 1e-3) -> None:
        """Starts a new layer on decorrelated pixels, so that edges count as much as brightness from the first step.

        Neighboring pixels are nearly equal, so a patch's mean outweighs all that distinguishes it. The first
        projection is multiplied by the inverse square root of the pixels' covariance, the mean is taken off by its
        bias, and its output is scaled to unit variance.

        Args:
            patches: [P, C * patch_size**2] of images like those to train on.
            ridge: added to the variances, relative to their mean; keeps directions without variance from exploding.

        Raises:
            ValueError: if there are fewer patches than values in one patch, or all are equal.

        Source: Krizhevsky 2009, appendix A (ZCA); Jordan 2024 (arXiv 2404.00498) as the start of a first layer.
        """
        x = patches.double()
        if len(x) < x.shape[1] or not bool((x != x[0]).any()):
            raise ValueError(
                f"whitening needs at least as many patches as one has values ({x.shape[1]}), and not all the same; "
                f"got {len(x)}"
            )
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        scale = (values.clamp(min=0) + ridge * values.mean()).rsqrt()
        weight = self.patch_proj.weight.double() @ (vectors * scale) @ vectors.T
        weight = weight / ((x - mean) @ weight.T).std()
        self.patch_proj.weight.copy_(weight)
        self.patch_proj.bias.copy_(-(weight @ mean))

    def _angles(self, patch_positions: Tensor) -> Tensor:
        """[P, width/2]: angles by column, then by row."""
        half = self.patch_proj.out_features // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=patch_positions.device) / half
        frequency = 1.0 / self.base**exponents
        row, column = patch_positions.float().unbind(-1)
        return torch.cat([column[:, None] * frequency, row[:, None] * frequency], dim=-1)


def _rotated(features: Tensor, angle: Tensor) -> Tensor:
    """Rotates neighboring channels of [P, width] by [P, width/2]."""
    even, odd = features[..., 0::2], features[..., 1::2]
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], dim=-1).flatten(-2)


def _table(angle: Tensor) -> Tensor:
    """The sinusoidal table of [P, width/2] angles: sine and cosine of neighboring channels, [P, width]."""
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)
