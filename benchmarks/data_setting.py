"""The data module that the data benchmarks measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neo_components.data import NEODataModule, Source
from neo_components.data.text.conversation import image_token_ids
from neo_components.types import DocumentTokens, InputSpec

TOKENIZER = Path(__file__).parents[1] / "tests" / "data" / "conversation" / "tokenizer"


def ours(shards: Path, side: int, seq_len: int, workers: int = 0, **options: Any) -> NEODataModule:
    """The library's loader of a folder whose images are all ``side`` x ``side`` pixels."""
    data = NEODataModule(
        str(TOKENIZER), [Source(str(shards))], seq_len=seq_len, min_pixels=side**2, max_pixels=side**2,
        workers=workers, **options,
    )  # fmt: skip
    tokenizer = data.tokenizer
    data.input_spec = InputSpec(*image_token_ids(tokenizer), len(tokenizer), 16, 2, 3, positions)
    return data


def positions(document: DocumentTokens) -> torch.Tensor:
    """Nothing here looks at positions."""
    return torch.zeros(len(document.image_ids), 3, dtype=torch.int64)
