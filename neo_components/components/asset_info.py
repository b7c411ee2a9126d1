"""Anchors and provenance: what a pre-Buffer asset stores beside its weights (``docs/asset.md``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Anchors:
    """Word embeddings of common tokens, for fitting a bridge to another language model.

    Args:
        tokens: the A tokens as text, spaces written as spaces (``vocabulary.token_strings``).
        vectors: [A, D] their word embeddings on the pre-Buffer's side.
    """

    tokens: list[str]
    vectors: Tensor


@dataclass
class AssetInfo:
    """What a saved pre-Buffer reports beside its weights.

    Args:
        image: normalization and pixel limits of the images that it was trained with.
        provenance: recipe, data, steps, scores, library version: plain values.
        license: license of the weights.
        card: text of the model card; a short one is written if empty.
    """

    image: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    card: str = ""
