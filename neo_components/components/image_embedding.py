"""What a patch embedding has to offer: the protocol between pixels and the blocks.

``data`` cuts an image into square patches; a patch embedding makes tokens of them, one for each visual token and for
whatever it adds (a class token, row ends, queries). It is registered in ``PATCH_EMBEDDINGS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neo_components.components.component import Component
from neo_components.errors import UnknownFlopsError
from neo_components.registry import KIND, PATCH_EMBEDDINGS, split
from neo_components.token_indices import sent
from neo_components.types import ImageLayout, TokenKind, plain_layout


class Product(NamedTuple):
    """One matrix product of a forward pass, for estimates of FLOPs.

    Attributes:
        rows: number of input vectors (rows of the left matrix).
        inputs: width of each.
        outputs: width of each output vector.
        trained: whether its weight takes a gradient.
    """

    rows: int
    inputs: int
    outputs: int
    trained: bool

    @classmethod
    def of(cls, rows: int, layer: nn.Linear) -> Product:
        """``rows`` vectors through a linear layer."""
        return cls(rows, layer.in_features, layer.out_features, layer.weight.requires_grad)


UNCOUNTED = (nn.modules.conv._ConvNd, nn.MultiheadAttention)
"""Layers with weights that are multiplied otherwise than by a linear layer, once for each patch."""


class ImageEmbedding(Component):
    """Base of all patch embeddings.

    A subclass takes ``hidden_size`` (D of the pre-Buffer) and its own options, keeps them by
    ``save_hyperparameters()``, and sets these attributes:

    Attributes:
        patch_size: side of a patch in pixels.
        fold: patches per side of a visual token.
        channels: image channels, C.
        image_layout: which tokens stand for an image of (rows, columns) visual tokens. A function of a module or an
            instance of a small class, as it goes to other processes with :class:`~neo_components.types.InputSpec`.
        each_token_alone: whether an image's tokens are its visual tokens and each is computed from its own ``fold**2``
            patches and their positions alone, so that a process can embed a part of an image (context parallelism).
            Not inherited: a derived class states it again.
    """

    patch_size: int
    fold: int = 1
    channels: int = 3
    each_token_alone: bool = False
    image_layout: ImageLayout = staticmethod(plain_layout)

    def forward(self, patches: Tensor, patch_positions: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """The tokens of all images, one image behind the other, each in the order of its layout.

        Args:
            patches: [P, C * patch_size**2], normalized pixels as (channel, y, x); the ``fold**2`` patches of a visual
                token, row by row, are neighbors.
            patch_positions: [P, 2] row and column of each patch in its image.
            image_grids: [I, 2] rows and columns of patches of each image, on the CPU, so that reading them waits for no
                device; ``None``: one layer that does not need them.

        Returns:
            [tokens, D].
        """
        raise NotImplementedError

    def arrange(self, visual: Tensor, image_grids: Tensor, added: Mapping[int, Tensor]) -> Tensor:
        """Visual tokens and added ones in the order of :attr:`image_layout`.

        Args:
            visual: [visual tokens, D], image by image and row by row.
            image_grids: [I, 2] rows and columns of patches of each image.
            added: kind -> vector [D] of every token of that kind.

        Returns:
            [tokens, D].
        """
        grids = [(rows // self.fold, columns // self.fold) for rows, columns in image_grids.tolist()]
        kinds = sent(torch.cat([self.image_layout(*grid) for grid in grids]), visual.device)[:, None]
        is_visual = kinds == TokenKind.VISUAL
        row = (is_visual.cumsum(0) - 1).clamp(min=0)[:, 0]  # of each visual token; a mask as an index would be read
        tokens = torch.where(is_visual, visual.index_select(0, row), torch.zeros_like(visual[:1]))
        for kind, vector in added.items():
            tokens = torch.where(kinds == kind, vector.to(tokens.dtype), tokens)
        return tokens

    def products(self, image_grids: Tensor) -> Sequence[Product]:
        """The matrix products of a forward pass over images of ``image_grids`` [I, 2], in order.

        By default every linear layer is counted once for each patch; products without weights are not counted.

        Raises:
            UnknownFlopsError: (a ``ValueError``) if there is a layer whose products are not those of a linear layer.
        """
        if odd := [type(part).__name__ for part in self.modules() if isinstance(part, UNCOUNTED)]:
            raise UnknownFlopsError(
                f"the FLOPs of a {odd[0]} are not known: {type(self).__name__} must define products(image_grids)"
            )
        patches = int(image_grids.prod(-1).sum())
        return [Product.of(patches, layer) for layer in self.modules() if isinstance(layer, nn.Linear)]


def embedding_config(embedding: ImageEmbedding) -> dict[str, Any]:
    """A patch embedding's arguments as config.json holds them; NEO's own needs no ``kind``."""
    name = PATCH_EMBEDDINGS.name_of(type(embedding))
    return ({} if name == "neo" else {KIND: name}) | dict(embedding.hparams)


def embedding_from(config: dict[str, Any]) -> ImageEmbedding:
    """The inverse of :func:`embedding_config`."""
    name, arguments = split({KIND: "neo"} | config)
    return PATCH_EMBEDDINGS[name](**arguments)
