"""The model of a recipe on the meta device, built from configs without weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_components.components.bridge import make_bridges
from neo_components.components.image_embedding import embedding_from
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.pre_buffer_files import asset_config
from neo_components.components.text_route import BYPASS, SHARED
from neo_components.llms.known import KNOWN
from neo_components.model.attach import AUTO
from neo_components.model.layouts import layout_of, parts_from_own, parts_from_released
from neo_components.model.neo import NEO
from neo_components.recipe import Checkpoint, Compose, PreBufferAsset, Recipe, load_recipe
from neo_components.recipe.building import config_of, llm_arguments, new_parts, with_choices_of
from neo_components.recipe.faults import RecipeError
from neo_components.recipe.load import complete
from neo_components.storage.deferred import unfilled
from neo_components.storage.hub import resolve
from neo_components.storage.pretrained import resolve_asset
from neo_components.storage.weights import as_dtype, read_config


def empty_model(recipe: Recipe, overrides: Sequence[str] = ()) -> tuple[NEO, list[str]]:
    """The model of a recipe on the meta device, and notes on the source of its shape.

    Reads only the configs of folders and Hub repositories. The shape of a missing one is still known if it is a
    language model of ``llms.known``, or the output (``OUTPUT/neo``) of another recipe in the same folder.

    Args:
        recipe: the recipe.
        overrides: those of ``load_recipe``; overrides of ``variables`` also apply to the other recipe.

    Raises:
        FileNotFoundError: if the shape is unknown.
        ValueError: if the configs do not fit the recipe.
    """
    model = complete(recipe.model)
    with unfilled():
        if isinstance(model, Checkpoint):
            made, notes = _checkpoint(recipe, model, overrides)
        elif isinstance(model.pre_buffer, PreBufferAsset):
            made, notes = _attached(model, model.pre_buffer)
        else:
            made, notes = _composed(model)
    if isinstance(model, Checkpoint) and model.text is not None:
        made.lead_text(model.text)
    made.pre_buffer.backend = made.post_llm.backend = model.backend
    return made.to(as_dtype(model.dtype)), notes


def _checkpoint(recipe: Recipe, model: Checkpoint, overrides: Sequence[str]) -> tuple[NEO, list[str]]:
    try:
        folder = resolve(model.from_pretrained, weights=False)
    except FileNotFoundError as error:
        if (maker := _maker(recipe, model.from_pretrained, overrides)) is None:
            raise FileNotFoundError(
                f"{error}; without it the shape of this model is unknown, and no recipe beside {recipe.path} makes it"
            ) from error
        made, notes = empty_model(maker, overrides)
        return made, [
            *notes,
            f"{model.from_pretrained} does not exist yet: using the shape of the model that {maker.path} makes",
        ]
    config = read_config(folder)
    parts = parts_from_released if layout_of(config, folder) == "released" else parts_from_own
    return NEO(**parts(config, folder)), []


def _maker(recipe: Recipe, wanted: str, overrides: Sequence[str]) -> Recipe | None:
    """The recipe in the same folder whose run makes that model."""
    shared = [text for text in overrides if text.startswith("variables.")]
    for path in sorted(recipe.path.parent.glob("*.yaml")):
        if path.resolve() == recipe.path.resolve():
            continue
        try:
            other = load_recipe(path, shared)
        except (RecipeError, OSError):  # not a valid recipe
            continue
        if Path(other.output) / "neo" == Path(wanted):
            return other
    return None


def _composed(model: Compose) -> tuple[NEO, list[str]]:
    sizes, notes = _llm_sizes(model)
    return NEO(*new_parts(model, sizes), PostLLM(**sizes), text=model.route), notes


def _attached(model: Compose, asset: PreBufferAsset) -> tuple[NEO, list[str]]:
    config = asset_config(resolve_asset(asset.from_pretrained, weights=False))
    pre_buffer = PreBuffer(**config["pre_buffer"])
    sizes, notes = _llm_sizes(with_choices_of(model, pre_buffer))
    inner, outer = pre_buffer.hparams.hidden_size, sizes["hidden_size"]
    bridge = model.bridge
    if bridge == AUTO:
        bridge = "identity" if inner == outer else "least_squares"
        notes = [*notes, "bridge auto: taken as identity, as the widths are equal"] if inner == outer else notes
    text = model.route
    if bridge != "identity" and model.text == AUTO:
        text = BYPASS
        notes = [*notes, "text auto: taken as bypass; shared if both bridges turn out to fit left-out tokens"]
    bridges = make_bridges(bridge, inner, outer, text == SHARED)
    patches = embedding_from(config["patch_embedding"])
    return NEO(patches, pre_buffer, PostLLM(**sizes), *bridges, text), notes


def _llm_sizes(model: Compose) -> tuple[dict[str, Any], list[str]]:
    """Arguments of the post-LLM, and notes; language models of ``llms.known`` need no files."""
    notes = []

    def known_or_there(source: str) -> tuple[dict[str, Any], Path]:
        if source not in KNOWN or Path(source).is_dir():
            return config_of(source)
        notes.append(f"{source}: shape from this library's table of known models, nothing was downloaded")
        return KNOWN[source], Path(source)

    return llm_arguments(model, known_or_there), notes
