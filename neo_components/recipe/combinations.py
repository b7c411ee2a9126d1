"""What no single key of a recipe can show: whether its parts fit together. No weights are loaded for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.errors import ArgumentError, ArgumentErrors
from neo_components.model.attach import AUTO
from neo_components.recipe.hints import required, required_arguments
from neo_components.recipe.parts import Part
from neo_components.recipe.reader import Reader
from neo_components.recipe.schema import (
    BRIDGE,
    CHOICES,
    FROM,
    PATCH_EMBEDDING,
    TAKEN,
    Checkpoint,
    NewPostLLM,
    NewPreBuffer,
    PreBufferAsset,
    block_choices,
)
from neo_components.registry import KIND, split
from neo_components.storage.deferred import unfilled

ANY_WIDTH = 4
"""Stands for a width that does not matter for what is checked."""


def check_combinations(reader: Reader) -> None:
    """Notes what does not fit together, as far as the single values are good."""
    _check_data(reader)
    _check_whitening(reader)
    form, model = reader.sections.get("model", (Checkpoint, {}))
    if form is Checkpoint:
        return
    _check_blocks(reader)
    # Blocks on a pretrained language model are not built here, as its sizes are not known.
    _check_part(reader, "model.rope", CHOICES["rope"], base_h=1.0, base_w=1.0)
    _check_part(reader, "model.patch_embedding", PATCH_EMBEDDING, hidden_size=ANY_WIDTH)
    _check_part(reader, "model.bridge", BRIDGE, in_width=ANY_WIDTH, out_width=ANY_WIDTH)
    asset = reader.sections.get("model.pre_buffer", (None, {}))[0]
    if asset is PreBufferAsset and "model.patch_embedding" in reader.sections:
        text = f"cannot stand beside model.pre_buffer.{FROM}: the asset has its own patch embedding; take it away"
        reader.fault("model.patch_embedding", text)
    if asset in (PreBufferAsset, None):
        return
    only = f"only an asset (model.pre_buffer.{FROM}) is attached by a bridge"
    if model.get("bridge", AUTO) != AUTO:
        reader.fault("model.bridge", f"got {model['bridge']!r}, but {only}")
    absent = {"bridge": only}
    if split(model.get("experts") or "none")[0] == "none":
        absent["visual_experts"] = "choose an expert routing by model.experts"
    trained = reader.given.get("stage", {}).get("train")
    for number, group in enumerate(trained if isinstance(trained, list) else ()):
        if group in absent:
            reader.fault(f"stage.train.{number}", f"this model has no {group!r}: {absent[group]}")


def _check_data(reader: Reader) -> None:
    from neo_components.data.module import NEODataModule

    if "data" in reader.sections:
        lacking: dict[str, Any] = {"tokenizer": "", "train": []}
        _try(reader, ["data"], NEODataModule, lacking | _good(reader, "data"))


def _check_whitening(reader: Reader) -> None:
    """A patch embedding is whitened before training, not after."""
    form, _ = reader.sections.get("model", (None, {}))
    asset, given = reader.sections.get("model.pre_buffer", (None, {}))
    trained = form is Checkpoint or (asset is PreBufferAsset and not given.get("reset"))
    if trained and reader.sections.get("stage", (None, {}))[1].get("whiten_patches"):
        reader.fault("stage.whiten_patches", "would undo the training of this model's patch embedding; take it away")


def _check_blocks(reader: Reader) -> None:
    """Sizes and settings of new blocks, and the choices for all of them, by the components themselves."""
    shared = block_choices(reader.sections["model"][1])
    around = [*(f"model.{name}" for name in CHOICES), "model"]
    llm: dict[str, Any] = {}
    if reader.sections.get("model.post_llm", (None,))[0] is NewPostLLM:
        llm = _good(reader, "model.post_llm")
        _try(reader, ["model.post_llm", *around], PostLLM, shared | llm)
    if reader.sections.get("model.pre_buffer", (None,))[0] is NewPreBuffer:
        own = {name: value for name, value in _good(reader, "model.pre_buffer").items() if value is not None}
        taken = {"hidden_size": ANY_WIDTH} | {name: llm[name] for name in TAKEN if name in llm}
        _try(reader, ["model.pre_buffer", *around, "model.post_llm"], PreBuffer, shared | taken | own)


def _check_part(reader: Reader, key: str, part: Part, **given: Any) -> None:
    """The options of a part, by the part itself."""
    form, _ = reader.sections.get(key, (None, {}))
    good = _good(reader, key)
    if form is not None and good.get(KIND) not in part.also and good.keys() >= set(required(form)):
        options = {name: value for name, value in good.items() if name not in part.beside}
        _try(reader, [key], partial(part.registry.make, {KIND: part.default, **options}), given)


def _good(reader: Reader, key: str) -> dict[str, Any]:
    """The values of a section that nothing is wrong with."""
    return {
        name: value
        for name, value in reader.sections.get(key, (None, {}))[1].items()
        if not any(fault.key == f"{key}.{name}" for fault in reader.faults)
    }


def _try(reader: Reader, keys: Sequence[str], component: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Lets the component itself look at its arguments, without weights, and notes what it refuses.

    Args:
        reader: takes the faults.
        keys: sections that the arguments come from, that of the component first.
        component: class or function.
        arguments: of it; if a required one is not known, nothing is done.
    """
    if not arguments.keys() >= set(required_arguments(component)):
        return
    try:
        with unfilled():
            component(**arguments)
    except ArgumentErrors as several:
        for error in several.errors:
            _note(reader, keys, error)
    except ArgumentError as error:
        _note(reader, keys, error)
    except ValueError as error:
        reader.fault(keys[0], str(error))


def _note(reader: Reader, keys: Sequence[str], error: ArgumentError) -> None:
    """Notes an error of an argument at the first section that gives it, or another that it does not go together with.

    One of an argument that has a fault already is left out: it was not passed on.
    """
    names = (error.argument, *error.others)
    faulty = {fault.key for fault in reader.faults}
    if faulty.intersection(f"{key}.{name}" for key in keys for name in names):
        return
    for key in keys:
        for name in names:
            if name.partition(".")[0] in reader.given.get(key, {}):
                reader.fault(f"{key}.{name}", error.text if name == error.argument else str(error))
                return
    reader.fault(keys[0], str(error))
