"""Writes a whole model as a folder that transformers loads by itself, with ``trust_remote_code=True``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch

from neo_components.export.hf.bundle import bundle
from neo_components.export.hf.text import chat_template, write_json, write_text_side
from neo_components.model.layouts import own_config
from neo_components.model.neo import NEO
from neo_components.registry import BRIDGES, EXPERTS, MASKS, PATCH_EMBEDDINGS, ROPES, Registry, split
from neo_components.storage.weights import save_folder, write_text

ROOTS = {
    f"neo_components.export.hf.{name}_neo": f"{name}_neo.py" for name in ("configuration", "modeling", "processing")
}
MODEL = "NEOForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": "configuration_neo.NEOConfig",
    "AutoModel": f"modeling_neo.{MODEL}",
    "AutoModelForImageTextToText": f"modeling_neo.{MODEL}",
}
PROCESSOR_MAP = {"AutoProcessor": "processing_neo.NEOProcessor"}
IMAGES_MAP = {"AutoImageProcessor": "processing_neo.NEOImageProcessor"}


def write_hf(
    model: NEO,
    tokenizer: Any,
    folder: str | Path,
    min_pixels: int,
    max_pixels: int,
    max_new_tokens: int = 256,
    license: str = "",
) -> Path:
    """Writes weights, config, code, tokenizer, processor, chat template and generation settings.

    Args:
        model: any model whose RoPE and mask are the library's own.
        tokenizer: Hugging Face tokenizer with the image tokens.
        folder: made if absent.
        min_pixels: images are scaled up to at least this many pixels.
        max_pixels: and down to at most this many.
        max_new_tokens: longest answer where a user of the folder does not say.
        license: license of the weights, for the model card.

    Returns:
        The folder. Equal models give equal bytes.

    Raises:
        ValueError: if the model has a part that is not the library's, so that its code cannot be taken along, or no
            chat template leads to the tokens that the model is asked in.
    """
    _check_parts(model)
    template = chat_template(tokenizer, images=True)
    files = bundle(ROOTS)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    folder = save_folder(folder, state, _config(model), _card(model, license))
    for name, text in files.items():
        write_text(folder / name, text)
    _check_code(folder, state)
    write_text_side(tokenizer, folder, template, max_new_tokens)
    write_json(folder / "processor_config.json", _processor(model, min_pixels, max_pixels))
    write_json(folder / "preprocessor_config.json", _images(model, min_pixels, max_pixels))
    return folder


def _config(model: NEO) -> dict[str, Any]:
    """config.json."""
    import transformers

    own = own_config(model)
    parts = {name: own[name] for name in ("patch_embedding", "pre_buffer", "post_llm", "bridge_in", "bridge_out")}
    parts["post_llm"] |= {"source": ""}  # a path of the machine that trained it
    return {
        "architectures": [MODEL],
        "auto_map": AUTO_MAP,
        "model_type": "neo_components",
        "dtype": str(model.post_llm.word_embedding.weight.dtype).removeprefix("torch."),
        **parts,
        "tie_word_embeddings": False,  # a tied head is the post-LLM's own affair
        "transformers_version": transformers.__version__,
        "use_cache": True,
    }


def _images(model: NEO, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """preprocessor_config.json."""
    spec = model.input_spec
    return {
        "auto_map": IMAGES_MAP, "fold": spec.fold, "image_processor_type": "NEOImageProcessor",
        "max_pixels": max_pixels, "min_pixels": min_pixels, "patch_size": spec.patch_size,
    }  # fmt: skip


def _processor(model: NEO, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """processor_config.json."""
    return {
        "auto_map": PROCESSOR_MAP, "image_ids": list(model.input_spec.image_special_token_ids),
        "image_processor": _images(model, min_pixels, max_pixels), "processor_class": "NEOProcessor",
    }  # fmt: skip


def _check_parts(model: NEO) -> None:
    """Refuses what comes from outside the library.

    Raises:
        ValueError: naming it.
    """
    if model.input_spec.channels != 3:
        raise ValueError(f"images have 3 channels, this model reads {model.input_spec.channels}; it has no processor")
    if not model.route.words_pass:
        raise ValueError(
            "a model with text='bypass' is not exported to this form, whose cache counts on every block reading every "
            "token; use NEO.save_pretrained, or `neo export ... --to program`"
        )
    for registry, name in _parts_of(model):
        part = registry[name]
        if part.__module__.split(".")[0] != "neo_components":
            raise ValueError(
                f"{registry.kind} {name!r} comes from {part.__module__}, which is no part of the library, so its code "
                "cannot be taken along; use NEO.save_pretrained, and load it where that module is imported"
            )


def _parts_of(model: NEO) -> Iterator[tuple[Registry, str]]:
    """Every part that a model has by name, with its registry."""
    for stack in (model.pre_buffer, model.post_llm):
        for registry, argument in ((ROPES, "rope"), (MASKS, "attention"), (EXPERTS, "experts")):
            yield registry, split(stack.hparams[argument])[0]
    yield PATCH_EMBEDDINGS, PATCH_EMBEDDINGS.name_of(type(model.patch_embedding))
    for bridge in (model.bridge_in, model.bridge_out):
        if bridge is not None:
            yield BRIDGES, BRIDGES.name_of(type(bridge))


def _check_code(folder: Path, state: dict[str, Any]) -> None:
    """Proves that the written code, loaded from the folder, wants the tensors that were written.

    Raises:
        ValueError: naming what differs.
    """
    modeling, config = _load(folder), json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        with torch.device("meta"):
            again = getattr(modeling, MODEL)(modeling.NEOConfig(**config))
        shapes = {name: tuple(tensor.shape) for name, tensor in again.state_dict().items()}
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == CHECKED]:
            del sys.modules[name]
    written = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if differ := sorted(set(shapes.items()) ^ set(written.items())):
        raise ValueError(f"the exported code does not fit the exported weights: {differ[:5]}")


CHECKED = "neo_components_exported"
"""Name under which a written folder is imported once."""


def _load(folder: Path) -> Any:
    """The folder's modelling code, as a package of its own."""
    spec = ModuleSpec(CHECKED, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]

    sys.modules[CHECKED] = module_from_spec(spec)
    return import_module(f"{CHECKED}.modeling_neo")


def _card(model: NEO, license: str) -> str:
    pre, llm = model.pre_buffer.hparams, model.post_llm.hparams
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n"
        f"license: {license or 'unknown'}\n---\n"
        "# Native vision-language model\n\n"
        f"A pre-Buffer of {pre.depth} and a post-LLM of {llm.depth} native primitives (NEO, arXiv 2510.14979), written "
        "by neo-components. The folder brings its own code:\n\n"
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER", trust_remote_code=True)\n'
        'processor = AutoProcessor.from_pretrained("THIS_FOLDER", trust_remote_code=True)\n'
        'content = [{"type": "image", "path": "IMAGE.png"}, {"type": "text", "text": "What is this?"}]\n'
        "inputs = processor.apply_chat_template(\n"
        '    [{"role": "user", "content": content}],\n'
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",\n'
        ")\n"
        "answer = model.generate(**inputs)[0, inputs.input_ids.shape[1] :]\n"
        "print(processor.decode(answer, skip_special_tokens=True))\n```\n"
    )
