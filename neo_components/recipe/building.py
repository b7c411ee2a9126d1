"""From the model section of a recipe to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from neo_components.components.image_embedding import ImageEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.llms import arguments_of
from neo_components.model.attach import attach
from neo_components.model.neo import NEO
from neo_components.recipe.load import complete
from neo_components.recipe.parts import split_beside
from neo_components.recipe.schema import (
    CHOICES,
    SHARED,
    TAKEN,
    Checkpoint,
    Compose,
    ModelRecipe,
    PreBufferAsset,
    PretrainedLLM,
    block_choices,
)
from neo_components.registry import PATCH_EMBEDDINGS
from neo_components.storage.deferred import new_weights
from neo_components.storage.hub import resolve
from neo_components.storage.weights import as_dtype, read_config

RESET = 0x5EED
"""Makes the seed of ``pre_buffer.reset`` from that of the run."""


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
        if model.text is not None:
            neo.lead_text(model.text)
        return neo
    if isinstance(model.pre_buffer, PreBufferAsset):
        return _attached(model, model.pre_buffer)
    sizes = llm_arguments(model)
    # The language model comes last: what does not fit stops before its weights are read.
    patch_embedding, pre_buffer = new_parts(model, sizes)
    dtype = as_dtype(model.dtype)
    return NEO(patch_embedding.to(dtype), pre_buffer.to(dtype), _post_llm(model, sizes), text=model.route)


def new_parts(model: Compose, sizes: dict[str, Any]) -> tuple[ImageEmbedding, PreBuffer]:
    """Patch embedding and pre-Buffer that fit a language model of such arguments and are no asset.

    Sizes and norm epsilon that the recipe does not give the pre-Buffer are the post-LLM's. What the language model's
    family does otherwise than NEO (norm placement, biases, windows ...) is not taken from it: a pre-Buffer is made to
    go from one language model to another, so its blocks are NEO's unless the recipe differs.
    """
    assert model.patch_embedding and not isinstance(model.pre_buffer, PreBufferAsset)
    own = {key: value for key, value in asdict(model.pre_buffer).items() if value is not None}
    taken = {name: sizes[name] for name in ("hidden_size", *TAKEN, *SHARED) if name in sizes}
    patch_embedding = PATCH_EMBEDDINGS.make(model.patch_embedding, hidden_size=sizes["hidden_size"])
    return patch_embedding, new_weights(lambda: PreBuffer(**taken | own | {"backend": model.backend}))


def _attached(model: Compose, asset: PreBufferAsset) -> NEO:
    """An asset on a language model that counts positions and masks as the asset does, unless the recipe differs."""
    pre_buffer = PreBuffer.from_pretrained(asset.from_pretrained, dtype=model.dtype)
    if asset.reset:
        pre_buffer = _with_new_weights(pre_buffer).to(as_dtype(model.dtype))
    pre_buffer.backend = model.backend
    model = with_choices_of(model, pre_buffer)
    llm = _post_llm(model, llm_arguments(model))
    return attach(pre_buffer, llm, bridge=model.bridge, text=model.text)


def with_choices_of(model: Compose, pre_buffer: PreBuffer) -> Compose:
    """The recipe for a language model under an asset: a part that it does not choose for the blocks is the asset's.

    Raises:
        ValueError: if the recipe chooses another rope than the asset was trained with.
    """
    assert isinstance(model.pre_buffer, PreBufferAsset)
    chosen: dict[str, Any] = {}
    for name, part in CHOICES.items():
        theirs = part.of_arguments(name, pre_buffer.hparams)
        chosen[name] = theirs if getattr(model, name) is None else getattr(model, name)
        ours, trained = (split_beside(choice, part.beside)[0] for choice in (chosen[name], theirs))
        if name == "rope" and ours != trained:
            raise ValueError(
                f"model.rope is {ours!r}, but the pre-Buffer {model.pre_buffer.from_pretrained} was trained with "
                f"{trained!r}; take model.rope away"
            )
    return replace(model, **chosen)


def _with_new_weights(trained: PreBuffer) -> PreBuffer:
    """A pre-Buffer of the same shapes with random weights; what it knows of its language model stays."""
    assert trained.patch_embedding is not None
    # By the run's own seed they could be the very weights that the asset's training began with.
    seed = torch.initial_seed() ^ RESET
    pre = new_weights(lambda: PreBuffer(**trained.hparams), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        old = trained.patch_embedding
        pre.adopt(type(old)(**old.hparams))
    pre.anchors, pre.info = trained.anchors, trained.info
    return pre


def config_of(source: str) -> tuple[dict[str, Any], Path]:
    """A language model's config, and its folder."""
    folder = resolve(source, weights=False)
    return read_config(folder), folder


def llm_arguments(
    model: Compose, config_of: Callable[[str], tuple[dict[str, Any], Path]] = config_of
) -> dict[str, Any]:
    """Arguments of the post-LLM; of a pretrained one those that its config gives.

    Raises:
        ValueError: if a pretrained one was trained with another base than the recipe's.
    """
    chosen = block_choices(vars(model))
    if not isinstance(model.post_llm, PretrainedLLM):
        return asdict(model.post_llm) | chosen
    source, base_t = model.post_llm.from_pretrained, chosen.pop("base_t", None)
    config, folder = config_of(source)
    sizes = arguments_of(config, folder, signature(PostLLM).parameters)
    if base_t not in (None, sizes["base_t"]):
        raise ValueError(
            f"model.rope.base_t is {base_t}, but the language model {source} was trained with {sizes['base_t']}; "
            "take base_t away, or give that value"
        )
    return sizes | chosen


def _post_llm(model: Compose, arguments: dict[str, Any]) -> PostLLM:
    if not isinstance(model.post_llm, PretrainedLLM):
        return new_weights(lambda: PostLLM(**arguments, backend=model.backend)).to(as_dtype(model.dtype))
    chosen = {name: value for name, value in block_choices(vars(model)).items() if name != "base_t"}
    return PostLLM.from_pretrained(model.post_llm.from_pretrained, **chosen, backend=model.backend, dtype=model.dtype)
