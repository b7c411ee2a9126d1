"""What no single key of a recipe can say: whether its parts fit together. No weights are loaded for it."""

from __future__ import annotations

import re
from typing import Any

import torch

from neo_components.components.block_arguments import PARAMETERS as BLOCK
from neo_components.components.patch_embeddings.neo import PatchEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.primitive import NativePrimitive
from neo_components.components.rotary import Rotary
from neo_components.recipe.hints import default_of, hints_of
from neo_components.recipe.reader import Reader
from neo_components.recipe.schema import FROM, Checkpoint, PreBufferAsset, PretrainedLLM, Rope

SIZES = ("num_heads", "num_kv_heads", "head_width", "feed_forward_size")
"""Sizes of a block that the components check."""


def check_combinations(reader: Reader) -> None:
    """Notes what does not fit together, as far as the single values are good."""
    _check_data(reader)
    _check_whitening(reader)
    form, model = reader.sections.get("model", (Checkpoint, {}))
    if form is Checkpoint:
        return
    _check_blocks(reader)
    if "model.patch_embedding" in reader.sections:
        _try(reader, "model.patch_embedding", PatchEmbedding, hidden_size=4, **_good(reader, "model.patch_embedding"))
    asset = reader.sections.get("model.pre_buffer", (None, {}))[0]
    if asset is PreBufferAsset and "model.patch_embedding" in reader.sections:
        text = f"cannot stand beside model.pre_buffer.{FROM}: the asset has its own patch embedding; take it away"
        reader.fault("model.patch_embedding", text)
    if asset in (PreBufferAsset, None):
        return
    only = f"only an asset (model.pre_buffer.{FROM}) is attached by a bridge"
    if model.get("bridge", "auto") != "auto":
        reader.fault("model.bridge", f"got {model['bridge']!r}, but {only}")
    trained = reader.given.get("stage", {}).get("train")
    if isinstance(trained, list) and "bridge" in trained:
        reader.fault(f"stage.train.{trained.index('bridge')}", f"this model has no 'bridge': {only}")


def _check_data(reader: Reader) -> None:
    from neo_components.data.module import NEODataModule

    if "data" in reader.sections:
        lacking: dict[str, Any] = {"tokenizer": "", "train": []}
        _try(reader, "data", NEODataModule, **lacking | _good(reader, "data"))


def _check_whitening(reader: Reader) -> None:
    """A patch embedding is whitened before it learns, not after."""
    form, _ = reader.sections.get("model", (None, {}))
    asset, given = reader.sections.get("model.pre_buffer", (None, {}))
    trained = form is Checkpoint or (asset is PreBufferAsset and not given.get("reset"))
    if trained and reader.sections.get("stage", (None, {}))[1].get("whiten_patches"):
        reader.fault("stage.whiten_patches", "would undo what this model's patch embedding has learnt; take it away")


def _check_blocks(reader: Reader) -> None:
    """Head counts and widths of new blocks, and the RoPE on them."""
    rope = {name: default_of(PostLLM, name) for name in ("base_t", "base_h", "base_w")} | {"rope": Rope().kind}
    rope |= {key: value for key, value in _good(reader, "model.rope").items() if value is not None and key != "kind"}
    rope |= {"rope": _good(reader, "model.rope").get("kind", Rope().kind)}
    sizes: dict[str, Any] = {}
    for key in ("model.post_llm", "model.pre_buffer"):
        values = {name: value for name, value in _good(reader, key).items() if value is not None}
        # What a new pre-Buffer does not say, it takes from the post-LLM, which comes first here.
        sizes |= {name: value for name, value in values.items() if name in SIZES}
        own = {name: value for name, value in values.items() if name in BLOCK and name not in (*SIZES, "hidden_size")}
        new = set(reader.given.get(key, {})).intersection(BLOCK) and FROM not in hints_of(
            reader.sections.get(key, (PretrainedLLM, {}))[0]
        )
        if new and set(SIZES) <= set(sizes):
            _try(reader, key, NativePrimitive, hidden_size=1, **sizes, **own)
            turning = {name: own[name] for name in ("rope_scaling", "rotary_width") if name in own}
            _try(reader, key, Rotary, device="cpu", head_width=sizes["head_width"], **rope, **turning)


def _good(reader: Reader, key: str) -> dict[str, Any]:
    """The values of a section that nothing is wrong with."""
    return {
        name: value
        for name, value in reader.sections.get(key, (None, {}))[1].items()
        if not any(fault.key == f"{key}.{name}" for fault in reader.faults)
    }


def _try(reader: Reader, key: str, component: Any, device: str = "meta", **arguments: Any) -> None:
    """Lets the component itself look at the arguments; what it says are faults of the section.

    On the meta device, where nothing takes room. A message that speaks of an argument with a fault of its own is left
    out, as that argument was not passed on.
    """
    try:
        with torch.device(device):
            component(**arguments)
    except ValueError as error:
        faulty = {fault.key.rpartition(".")[2] for fault in reader.faults if fault.key.startswith(f"{key}.")}
        for text in str(error).split("; "):
            words = re.findall(r"\w+", text)
            if not faulty.isdisjoint(words):
                continue
            # The first argument that it speaks of and that the recipe gives is the one to look at.
            name = next((word for word in words if word in reader.given[key]), "")
            reader.fault(f"{key}.{name}" if name else key, text.removeprefix(name).strip())
