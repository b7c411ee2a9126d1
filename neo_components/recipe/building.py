"""From the model section of a recipe to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from neo_components.components.patch_embedding import PatchEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.llms import arguments_of
from neo_components.model.attach import attach
from neo_components.model.neo import NEO
from neo_components.recipe.load import complete
from neo_components.recipe.schema import Checkpoint, Compose, ModelRecipe, PreBufferAsset, PretrainedLLM, Rope
from neo_components.storage.deferred import new_weights
from neo_components.storage.hub import resolve
from neo_components.storage.weights import as_dtype, read_config

BLOCKS = (
    "hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size", "norm_eps",
    "rope", "base_t", "base_h", "base_w", "attention",
)  # fmt: skip
"""Arguments that a new pre-Buffer takes from the post-LLM where the recipe gives it none of its own.

What a family does otherwise than NEO (norm placement, biases, windows ...) is not among them: a pre-Buffer is made to
go from one language model to another, so its blocks are NEO's unless the recipe says else.
"""

RESET = 0x5EED
"""Turns a run's seed into that of ``pre_buffer.reset``."""


def build(model: ModelRecipe) -> NEO:
    """The model that a recipe describes. New weights are random: seed before, for the same ones again.

    Args:
        model: ``recipe.model``.

    Raises:
        FileNotFoundError: if a folder or hub repository that the recipe names is not there.
        ValueError: if what is there does not fit the recipe.
    """
    model = complete(model)
    if isinstance(model, Checkpoint):
        neo = NEO.from_pretrained(model.from_pretrained, dtype=model.dtype)
        neo.pre_buffer.backend = neo.post_llm.backend = model.backend
        return neo
    if isinstance(model.pre_buffer, PreBufferAsset):
        return _attached(model, model.pre_buffer)
    assert model.rope and model.attention and model.patch_embedding
    sizes = llm_arguments(model, model.rope, model.attention)
    # The language model comes last: what does not fit stops before its weights are read.
    with new_weights():
        patch_embedding, pre_buffer = new_parts(model, sizes)
    dtype = as_dtype(model.dtype)
    return NEO(patch_embedding.to(dtype), pre_buffer.to(dtype), _post_llm(model, sizes), text=model.text)


def new_parts(model: Compose, sizes: dict[str, Any]) -> tuple[PatchEmbedding, PreBuffer]:
    """Patch embedding and pre-Buffer that fit a language model of such arguments and are no asset."""
    assert model.patch_embedding and not isinstance(model.pre_buffer, PreBufferAsset)
    own = {key: value for key, value in asdict(model.pre_buffer).items() if value is not None}
    pre_buffer = PreBuffer(**{name: sizes[name] for name in BLOCKS} | own, backend=model.backend)
    return PatchEmbedding(hidden_size=sizes["hidden_size"], **asdict(model.patch_embedding)), pre_buffer


def _attached(model: Compose, asset: PreBufferAsset) -> NEO:
    """An asset on a language model that counts positions and masks as the asset does, unless the recipe says else."""
    pre_buffer = PreBuffer.from_pretrained(asset.from_pretrained, dtype=model.dtype)
    if asset.reset:
        pre_buffer = _with_new_weights(pre_buffer).to(as_dtype(model.dtype))
    pre_buffer.backend = model.backend
    sizes = llm_arguments(model, *counting_of(model, asset, pre_buffer))
    return attach(pre_buffer, _post_llm(model, sizes), bridge=model.bridge, text=model.text)


def counting_of(model: Compose, asset: PreBufferAsset, pre_buffer: PreBuffer) -> tuple[Rope, str]:
    """Rope and attention of a language model under an asset: those of the recipe, else the asset's own.

    Raises:
        ValueError: if the recipe names another rope than the asset was trained with.
    """
    h: Any = pre_buffer.hparams
    rope = model.rope or Rope(kind=h.rope, base_h=h.base_h, base_w=h.base_w)
    if rope.kind != h.rope:
        raise ValueError(
            f"model.rope.kind is {rope.kind!r}, but the pre-Buffer {asset.from_pretrained} was trained with "
            f"{h.rope!r}; take model.rope away"
        )
    return rope, model.attention or h.attention


def _with_new_weights(trained: PreBuffer) -> PreBuffer:
    """A pre-Buffer of the same shapes with random weights; what it is told about its language model stays."""
    assert trained.patch_embedding is not None
    with torch.random.fork_rng(devices=[]), new_weights():
        # By the run's own seed they could be the very weights that the asset's training began with.
        torch.manual_seed(torch.initial_seed() ^ RESET)
        new = PreBuffer(**trained.hparams)
        new.adopt(PatchEmbedding(**trained.patch_embedding.hparams))
    new.anchors, new.info = trained.anchors, trained.info
    return new


def config_of(source: str) -> tuple[dict[str, Any], Path]:
    """A language model's config, and the folder that it lies in."""
    folder = resolve(source, weights=False)
    return read_config(folder), folder


def llm_arguments(
    model: Compose, rope: Rope, attention: str, config_of: Callable[[str], tuple[dict[str, Any], Path]] = config_of
) -> dict[str, Any]:
    """Arguments of the post-LLM; of a pretrained one those that its config gives.

    Raises:
        ValueError: if a pretrained one was trained with another base than the recipe's.
    """
    said = {"rope": rope.kind, "base_h": rope.base_h, "base_w": rope.base_w, "attention": attention}
    base_t = {} if rope.base_t is None else {"base_t": rope.base_t}
    if not isinstance(model.post_llm, PretrainedLLM):
        return asdict(model.post_llm) | said | base_t
    source = model.post_llm.from_pretrained
    config, folder = config_of(source)
    sizes = arguments_of(config, folder, signature(PostLLM).parameters)
    if rope.base_t not in (None, sizes["base_t"]):
        raise ValueError(
            f"model.rope.base_t is {rope.base_t}, but the language model {source} was trained with {sizes['base_t']}; "
            "take base_t away, or give that value"
        )
    return sizes | said


def _post_llm(model: Compose, arguments: dict[str, Any]) -> PostLLM:
    if not isinstance(model.post_llm, PretrainedLLM):
        with new_weights():
            new = PostLLM(**arguments, backend=model.backend)
        return new.to(as_dtype(model.dtype))
    said = {name: arguments[name] for name in ("rope", "base_h", "base_w", "attention")}
    return PostLLM.from_pretrained(model.post_llm.from_pretrained, **said, backend=model.backend, dtype=model.dtype)
