"""Saving and loading of a NEO: config, weights and model card, in our own layout or the released one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from neo_components.model.layouts import (
    layout_of,
    load_released,
    own_config,
    parts_from_own,
    parts_from_released,
    save_released,
)
from neo_components.model.parts import NEOParts
from neo_components.storage.deferred import unfilled
from neo_components.storage.hub import resolve
from neo_components.storage.weights import (
    TensorFiles,
    as_dtype,
    load_strict,
    materialize,
    read_config,
    save_description,
    save_folder,
)


class NEOFiles(NEOParts):
    """Saving and loading of a ``NEO``."""

    if TYPE_CHECKING:

        def __init__(self, **parts: Any) -> None: ...

    def save_pretrained(self, folder: str | Path, layout: str = "neo_components") -> Path:
        """Writes the model.

        Args:
            folder: made if absent.
            layout: ``neo_components``, or ``released`` (the layout of the published NEO weights; there the vectors of
                ``<img>`` and ``</img>`` are rows of the word embedding, so with tied embeddings these two tokens'
                logits follow them).

        Raises:
            ValueError: if the layout is unknown or cannot hold this model.
        """
        if layout == "released":
            return save_released(self, folder)
        if layout != "neo_components":
            raise ValueError(f"layout must be 'neo_components' or 'released', got {layout!r}")
        return save_folder(folder, self.state_dict(), own_config(self), self._card())

    def save_description(self, folder: str | Path) -> None:
        """Writes config.json and the model card of the own layout, for a caller that writes the weights itself."""
        save_description(Path(folder), own_config(self), self._card())

    def _card(self) -> str:
        pre, llm = self.pre_buffer.hparams, self.post_llm.hparams
        return (
            "---\nlibrary_name: neo-components\npipeline_tag: image-text-to-text\n---\n"
            "# Native vision-language model\n\n"
            f"A pre-Buffer of {pre.depth} and a post-LLM of {llm.depth} native primitives (NEO, arXiv 2510.14979), "
            f"{sum(p.numel() for p in self.parameters()):,} parameters.\n\n"
            "```python\nfrom neo_components import NEO\n\n"
            'model = NEO.from_pretrained("THIS_FOLDER")\n```\n'
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype | str = "float32") -> Self:
        """Reads a model in our own or the released layout, distinguished by config.json. No random numbers are drawn.

        Args:
            source: folder or hub id.
            dtype: of the weights in memory, whatever the files hold: float32, bfloat16 or float16.

        Raises:
            FileNotFoundError: if there is no checkpoint, or only a pickled one.
            ValueError: if it is no NEO model, or a tensor is missing, unexpected or misshapen.
        """
        dtype = as_dtype(dtype)
        folder = resolve(source)
        config = read_config(folder)
        released = layout_of(config, folder) == "released"
        with unfilled():
            model = cls(**(parts_from_released if released else parts_from_own)(config, folder))
        if released:
            load_released(model, folder, dtype)
        else:
            load_strict(model, TensorFiles(folder), dtype=dtype)
            materialize(model, dtype)
        return model
