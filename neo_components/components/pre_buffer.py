"""The pre-Buffer: native primitives before the language model (NEO paper section 3.2), with the patch embedding.

It carries the patch embedding layer and the two vectors that frame an image, so that its weights alone are the
reusable asset: save it, load it in another project, attach it to another language model.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import nn

from neo_components.components.asset_info import Anchors, AssetInfo
from neo_components.components.block_arguments import BlockArguments, flat_arguments
from neo_components.components.image_embedding import ImageEmbedding
from neo_components.components.pre_buffer_files import PreBufferFiles
from neo_components.components.stack import PrimitiveStack


@flat_arguments
class PreBuffer(PrimitiveStack, PreBufferFiles):
    """``depth`` native primitives of width D. The arguments are those of the post-LLM that it is trained with.

    Called as :meth:`PrimitiveStack.forward`: it maps embedded tokens, visual and text alike.

    Args:
        depth: number of primitives; 0 passes everything through.
        backend: attention backend.
        init_std: standard deviation of the initial projections.

    Attributes:
        patch_embedding: the patch embedding in front of it, once :meth:`adopt` or ``NEO`` joined them.
        boundary: [2, D] vectors of the tokens ``<img>`` and ``</img>``.
        anchors: :class:`Anchors` of the language model that it was trained with, if known.
        info: :class:`AssetInfo`.
    """

    def __init__(
        self, depth: int, *, backend: str = "auto", init_std: float = 0.02, **block: Unpack[BlockArguments]
    ) -> None:
        super().__init__()
        self.build(self.given)
        self.patch_embedding = None
        self.boundary = nn.Parameter(torch.empty(2, block["hidden_size"]))
        self.anchors = None
        self.info = AssetInfo()
        self.init_weights()

    def init_weights(self) -> None:
        """Sets all weights of a new pre-Buffer."""
        super().init_weights()
        nn.init.normal_(self.boundary, 0.0, self.hparams.init_std)

    def adopt(self, patch_embedding: ImageEmbedding) -> None:
        """Joins a patch embedding layer, which becomes part of the asset.

        Raises:
            ValueError: if the widths differ.
        """
        if patch_embedding.hparams.hidden_size != self.hparams.hidden_size:
            raise ValueError(
                f"patch embedding of hidden size {patch_embedding.hparams.hidden_size} does not fit "
                f"a pre-Buffer of hidden size {self.hparams.hidden_size}"
            )
        self.patch_embedding = patch_embedding


__all__ = ["Anchors", "AssetInfo", "PreBuffer"]
