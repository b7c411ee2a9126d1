"""Options of the commands that compute with a model, and how they open it. Heavy modules load inside."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from neo_components.model.chat import Chat

Model = Annotated[str, typer.Argument(help="Model folder, Hub id, or output folder of a run.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="Output folder.")]
Device = Annotated[
    str,
    typer.Option(
        help="Device to compute on: cpu, cuda (the first GPU), cuda:N, mps, or auto (cuda, else mps, else cpu)."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type to compute in: float32, bfloat16, float16, or auto (as saved; float32 if the device lacks that)."
    ),
]


def open_chat(model: str, device: str, dtype: str, computes: bool = True) -> Chat:
    """A model on its device, with tokenizer and image limits.

    Args:
        model: folder, hub id, or output folder of a run.
        device: of ``--device``.
        dtype: of ``--dtype``.
        computes: whether the device must compute in that type; else the weights are only written in it.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if the device is not there or does not compute in that type, or a file does not fit.
    """
    from neo_components.devices import find_device, find_dtype
    from neo_components.model.chat import Chat
    from neo_components.storage.weights import TensorFiles, read_config

    where = find_device(device)
    folder = model_folder(model)
    read_config(folder)  # what is no checkpoint is refused before its tensors are looked for
    chosen = find_dtype(dtype, where, TensorFiles(folder).dtype()) if computes else stored_dtype(folder, dtype)
    return Chat.from_pretrained(folder, dtype=chosen, device=where)


def stored_dtype(source: str | Path, dtype: str) -> torch.dtype:
    """The type of weights that are written and not computed with: as named, or for ``auto`` as saved in ``source``.

    Raises:
        ValueError: if the name is unknown.
    """
    from neo_components.devices import AUTO
    from neo_components.storage.hub import resolve
    from neo_components.storage.weights import TensorFiles, as_dtype

    return as_dtype(TensorFiles(resolve(source)).dtype() if dtype == AUTO else dtype)


def model_folder(model: str) -> Path:
    """The folder of a model; for the output folder of a run, the model in it."""
    from neo_components.storage.hub import resolve
    from neo_components.storage.weights import CONFIG

    folder = resolve(model)
    return folder / "neo" if not (folder / CONFIG).is_file() and (folder / "neo" / CONFIG).is_file() else folder


def quiet() -> None:
    """Silences Lightning's messages about absent devices and other products; call after importing it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")  # Lightning's own, no user can fix it
