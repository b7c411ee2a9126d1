"""neo-components: reusable parts of native vision-language models (NEO, arXiv 2510.14979) for PyTorch Lightning.

Names load on first use, so that ``import neo_components`` and the command line start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from neo_components.components.bridge import Bridge
    from neo_components.components.patch_embeddings.neo import PatchEmbedding
    from neo_components.components.post_llm import PostLLM
    from neo_components.components.pre_buffer import PreBuffer
    from neo_components.components.primitive import NativePrimitive
    from neo_components.data.packing import pack
    from neo_components.model.attach import attach
    from neo_components.model.neo import NEO
    from neo_components.recipe import build, load_recipe
    from neo_components.types import Batch, InputSpec, Output, Sample

_HOMES = {
    "NEO": "model.neo",
    "PatchEmbedding": "components.patch_embeddings.neo",
    "NativePrimitive": "components.primitive",
    "PreBuffer": "components.pre_buffer",
    "PostLLM": "components.post_llm",
    "Bridge": "components.bridge",
    "Sample": "types",
    "Batch": "types",
    "InputSpec": "types",
    "Output": "types",
    "pack": "data.packing",
    "attach": "model.attach",
    "load_recipe": "recipe",
    "build": "recipe",
}

__all__ = [
    "NEO", "Batch", "Bridge", "InputSpec", "NativePrimitive", "Output", "PatchEmbedding", "PostLLM", "PreBuffer",
    "Sample", "attach", "build", "load_recipe", "pack",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'neo_components' has no attribute {name!r}")
    return getattr(import_module(f"neo_components.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
