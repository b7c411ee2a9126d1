"""What lies in an asset's folder beside its weights: anchors, image settings, model card; and what is refused there.

An asset comes from somewhere else, so nothing in it is trusted: no file but the five of ``docs/asset.md`` is opened,
nothing in them names another file or code, and the sizes that the config claims are compared with the tensors' own
before anything of these sizes is made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_components.storage.weights import TensorFiles, save_tensors, write_text

ANCHORS = "anchors"
PREPROCESSOR = "preprocessor_config.json"
LARGEST = 2**22
"""No size in a config is larger; what is made while a config is read stays small."""


def write_preprocessor(folder: Path, image: Mapping[str, Any], patch: Mapping[str, Any]) -> None:
    """Writes preprocessor_config.json: how pixels become patches, for programs that know nothing of this library.

    Args:
        folder: of the asset.
        image: normalization and pixel limits, as in ``AssetInfo``.
        patch: arguments of the patch embedding.
    """
    own = {name: patch[name] for name in ("patch_size", "fold", "channels")}
    text = json.dumps(dict(image) | own, indent=2, sort_keys=True, ensure_ascii=False)
    write_text(folder / PREPROCESSOR, text + "\n")


def write_anchors(folder: Path, tokens: Sequence[str], vectors: Tensor) -> None:
    """Writes anchors.safetensors: the tokens' text, joined by zero bytes, and their vectors in float16.

    Args:
        folder: of the asset.
        tokens: A texts; those with a zero byte in them are left out with their vectors.
        vectors: [A, D].
    """
    kept = [index for index, text in enumerate(tokens) if "\0" not in text]
    strings = "\0".join(tokens[index] for index in kept).encode()
    table = {"vectors": vectors[kept].half(), "tokens": torch.frombuffer(bytearray(strings), dtype=torch.uint8)}
    save_tensors(folder / f"{ANCHORS}.safetensors", table)


def read_anchors(folder: Path, width: int) -> tuple[list[str], Tensor] | None:
    """Texts and vectors [A, D] of anchors.safetensors; ``None`` if the asset has none.

    Args:
        folder: of the asset.
        width: D.

    Raises:
        ValueError: if the file is damaged or does not fit.
    """
    if not (folder / f"{ANCHORS}.safetensors").is_file():
        return None
    files = TensorFiles(folder, ANCHORS)
    path = folder / f"{ANCHORS}.safetensors"
    if sorted(files.names()) != ["tokens", "vectors"]:
        raise ValueError(f"{path} must hold 'tokens' and 'vectors', got {', '.join(sorted(files.names()))}")
    strings, vectors = files.get("tokens"), files.get("vectors")
    if strings.dtype != torch.uint8 or strings.dim() != 1 or not vectors.is_floating_point():
        raise ValueError(f"{path} must hold 'tokens' as bytes and 'vectors' as floats")
    try:
        tokens = bytes(strings.tolist()).decode().split("\0")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: its tokens are not UTF-8 ({error}); export the asset again") from error
    if tuple(vectors.shape) != (len(tokens), width):
        raise ValueError(
            f"{path} has {len(tokens)} tokens and vectors of shape {tuple(vectors.shape)}; wanted "
            f"({len(tokens)}, {width}): one row each, as wide as the pre-Buffer"
        )
    return tokens, vectors.float()


def check_sizes(config: Mapping[str, Any], files: TensorFiles) -> None:
    """Compares what a config claims with the stored tensors, before a module of these sizes is built.

    Args:
        config: config.json of the asset.
        files: its tensors.

    Raises:
        ValueError: naming the claim that does not hold.
    """
    for part in ("pre_buffer", "patch_embedding"):
        section = config.get(part)
        if not isinstance(section, dict):
            raise ValueError(f"{files.folder}/config.json does not describe a pre-Buffer: {part!r} is {section!r:.80}")
        for name, value in section.items():
            if isinstance(value, int) and value > LARGEST:
                raise ValueError(f"{files.folder}/config.json: {part}.{name} is {value}, more than {LARGEST}")
    for part, kind in (("image", dict), ("provenance", dict), ("license", str)):
        if not isinstance(config.get(part, kind()), kind):
            raise ValueError(f"{files.folder}/config.json: {part} must be a {kind.__name__}, got {config[part]!r:.80}")
    layers = {name.split(".")[1] for name in files.names() if name.startswith("layers.")}
    claimed = config["pre_buffer"].get("depth")
    if claimed != len(layers):
        raise ValueError(f"{files.folder}/config.json claims depth {claimed!r}, the tensors have {len(layers)} layers")
    # Tables of a head's width are made in full while a module is built.
    heads = config["pre_buffer"].get("num_heads"), config["pre_buffer"].get("head_width")
    if layers and "layers.0.self_attn.q_proj.weight" in files.names():
        rows = files.shape("layers.0.self_attn.q_proj.weight")[0]
        if not all(isinstance(n, int) for n in heads) or heads[0] * heads[1] != rows:
            raise ValueError(f"{files.folder}/config.json claims {heads[0]} heads of width {heads[1]}, stored: {rows}")


def model_card(config: Mapping[str, Any], side: int) -> str:
    """The model card of an asset: what it is, how it is attached, where it comes from, its scores.

    Args:
        config: its config.json.
        side: of a visual token in pixels.
    """
    h = config["pre_buffer"]
    return (
        f"---\nlibrary_name: neo-components\nlicense: {config['license'] or 'unknown'}\n---\n"
        "# Pre-Buffer of a native vision-language model\n\n"
        f"{h['depth']} native primitives of width {h['hidden_size']} ({h['num_heads']} query heads, "
        f"{h['num_kv_heads']} key/value heads of width {h['head_width']}, RoPE `{h['rope']}`, attention "
        f"`{h['attention']}`) behind a patch embedding; a visual token is {side} x {side} pixels. NEO, arXiv "
        "2510.14979.\n\n"
        "```python\nfrom neo_components import PreBuffer, attach\n\n"
        '# Words pass it too where bridges between the widths fit them, else they go around it; text="..." decides.\n'
        'model = attach(PreBuffer.from_pretrained("THIS_FOLDER"), llm="YOUR_LLM")\n```\n' + _origin(config)
    )


def _origin(config: Mapping[str, Any]) -> str:
    """Stages and scores as tables, and whatever else the provenance says as a list."""
    provenance = dict(config["provenance"])
    stages = provenance.pop("stages", [])
    text = ""
    if stages:
        text += "\n## Training\n\n| stage | steps | trained | data | seed | measured at its end |\n"
        text += "|---|---|---|---|---|---|\n"
        for stage in stages:
            scores = ", ".join(f"{name} {value}" for name, value in stage.get("metrics", {}).items()) or "nothing"
            cells = [stage.get("stage", ""), stage.get("steps", ""), *(_list(stage, n) for n in ("trained", "data"))]
            text += "| " + " | ".join(map(str, [*cells, stage.get("seed", ""), scores])) + " |\n"
    rest = "".join(f"- {name}: {value}\n" for name, value in sorted(provenance.items()) if name != "recipe")
    return text + (f"\n## Provenance\n\n{rest}" if rest else "")


def _list(stage: Mapping[str, Any], name: str) -> str:
    return ", ".join(map(str, stage.get(name, [])))
