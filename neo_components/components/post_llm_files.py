"""Reading a language model's folder as a post-LLM."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from neo_components.components.component import Component
from neo_components.components.primitive import NativePrimitive
from neo_components.llms import arguments_of, family_of
from neo_components.llms.layout import FamilyFiles
from neo_components.registry import Choice
from neo_components.storage.deferred import gathered, later, unfilled
from neo_components.storage.hub import resolve
from neo_components.storage.weights import TensorFiles, as_dtype, load_strict, materialize, read_config


class PostLLMFiles(Component):
    """Loading of a ``PostLLM``."""

    hf_config: dict[str, Any] | None = None

    if TYPE_CHECKING:

        def __init__(self, **arguments: Any) -> None: ...

        def hw_modules(self) -> list[torch.nn.Module]: ...

        def expert_modules(self) -> list[torch.nn.Module]: ...

        @property
        def blocks(self) -> list[NativePrimitive]: ...

        def init_new_in(self, block: NativePrimitive) -> None: ...

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        rope: Choice = "native",
        base_h: float = 1e4,
        base_w: float = 1e4,
        attention: Choice = "mixed",
        experts: Choice = "none",
        backend: str = "auto",
        dtype: torch.dtype | str = "float32",
    ) -> Self:
        """Reads a language model in the Hugging Face layout and widens it. No random numbers are drawn for it.

        Args:
            source: folder or hub id; safetensors, one file or several.
            rope: registered name of the RoPE variant, or a mapping of ``kind`` and its options.
            base_h: base of the new H frequencies; that of T is the language model's.
            base_w: base of the new W frequencies.
            attention: registered name of the mask rule, or a mapping of ``kind`` and its options.
            experts: registered name of the expert routing by modality; its new weights start as copies of the language
                model's.
            backend: attention backend.
            dtype: of the weights in memory, whatever the files hold: float32, bfloat16 or float16.

        Raises:
            FileNotFoundError: if there is no checkpoint, or only a pickled one.
            ValueError: if the family or a setting is not supported, or the tensors do not fit.
        """
        dtype = as_dtype(dtype)
        folder = resolve(source)
        config = read_config(folder)
        family = family_of(config)
        sizes = arguments_of(config, folder, inspect.signature(cls).parameters)
        ids = image_token_ids(folder, sizes["vocab_size"])
        with unfilled():
            module = cls(
                **sizes, **ids, rope=rope, base_h=base_h, base_w=base_w, attention=attention, experts=experts,
                source=str(source), backend=backend,
            )  # fmt: skip
        new = {id(p) for part in (*module.hw_modules(), *module.expert_modules()) for p in part.parameters()}
        names = [name for name, parameter in module.named_parameters() if id(parameter) not in new]
        files = FamilyFiles(TensorFiles(folder), family, sizes, names)
        load_strict(module, files, files.rename, ignore=files.superfluous(), only=set(names).__contains__, dtype=dtype)
        materialize(module, dtype)
        for block in module.blocks:
            later(block, partial(_init_new, module, block))
        module.hf_config = config
        return module


def _init_new(module: PostLLMFiles, block: NativePrimitive) -> None:
    """Starts the new parts of one block, whose weights may be sharded."""
    with gathered(block.self_attn, *(part for pair in block.added for part in pair)):
        module.init_new_in(block)


IMAGE_TOKENS = {"image_token_id": "<IMG_CONTEXT>", "image_start_id": "<img>", "image_end_id": "</img>"}


def image_token_ids(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Ids of the image tokens: those of the folder's tokenizer, else the next free ones, in the order of
    ``IMAGE_TOKENS``; a folder without tokenizer counts on from ``vocab_size``."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {name: vocab_size + index for index, name in enumerate(IMAGE_TOKENS)}
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    # add_special_tokens leaves known tokens as they are, and is what load_tokenizer does to the same file.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in IMAGE_TOKENS.values()])
    return {name: tokenizer.token_to_id(token) for name, token in IMAGE_TOKENS.items()}
