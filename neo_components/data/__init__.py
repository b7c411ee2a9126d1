"""Data: images and conversations to token ids, shards on disk, packed batches.

Names load on first use, so that looking at images does not import Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_components.data.convert.base import Converter as Converter
    from neo_components.data.convert.engine import convert_to_shards as convert_to_shards
    from neo_components.data.image.images import load_image as load_image
    from neo_components.data.image.images import max_pixels_per_image as max_pixels_per_image
    from neo_components.data.image.images import smart_resize as smart_resize
    from neo_components.data.module import NEODataModule as NEODataModule
    from neo_components.data.packing import pack as pack
    from neo_components.data.plan.mixture import Source as Source
    from neo_components.data.shards.folder import read_shards as read_shards
    from neo_components.data.shards.format import write_shards as write_shards
    from neo_components.data.text.conversation import encode_conversation as encode_conversation
    from neo_components.data.text.conversation import encode_prompt as encode_prompt
    from neo_components.data.text.conversation import image_token_ids as image_token_ids
    from neo_components.data.text.conversation import load_tokenizer as load_tokenizer

_HOMES = {
    "encode_conversation": "neo_components.data.text.conversation",
    "encode_prompt": "neo_components.data.text.conversation",
    "image_token_ids": "neo_components.data.text.conversation",
    "load_tokenizer": "neo_components.data.text.conversation",
    "load_image": "neo_components.data.image.images",
    "max_pixels_per_image": "neo_components.data.image.images",
    "smart_resize": "neo_components.data.image.images",
    "Converter": "neo_components.data.convert.base",
    "convert_to_shards": "neo_components.data.convert.engine",
    "NEODataModule": "neo_components.data.module",
    "Source": "neo_components.data.plan.mixture",
    "read_shards": "neo_components.data.shards.folder",
    "write_shards": "neo_components.data.shards.format",
    "pack": "neo_components.data.packing",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
