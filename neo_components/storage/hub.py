"""Where a checkpoint lies: a folder, or a repository of the Hugging Face hub, of which what is needed is fetched."""

from __future__ import annotations

import json
import logging
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

from neo_components.storage.progress import SECONDS_BETWEEN_LINES

log = logging.getLogger(__name__)

SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]
"""Patterns of what describes a model: config, tokenizer, chat template, card. No pickles, no code."""

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
BESIDE = ["anchors.safetensors", "boundary.safetensors"]
"""Small weights of this library that lie beside the model's."""
PREFIX = "pretrained:"
"""Of the names of the pre-Buffer assets that ship; ``storage.pretrained.resolve_asset`` finds these."""


def resolve(source: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded, or taken from the hub's cache if it is there.

    Of a repository its top folder's safetensors, JSON and tokenizer files are fetched, and of the safetensors only
    those that the model is made of. A bar shows the bytes on a terminal, plain lines elsewhere.

    Args:
        source: a folder, or a hub id ``owner/name``.
        weights: whether the weights are needed; if not, a hub id costs a few small files only.

    Raises:
        FileNotFoundError: if it is neither a folder nor something the hub knows and can give now; the message says why
            and what to do.
        ValueError: if it is the name of a pre-Buffer asset that ships, where a model or tokenizer is expected.
    """
    name = str(source)
    if name.startswith(PREFIX):
        raise ValueError(
            f"{name!r} names a pre-Buffer asset, which has neither a language model nor a tokenizer; give a folder or "
            f"a hub id 'owner/name' of one here. `neo attach {name} LLM -o OUT` joins the asset to a language model"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"{name!r} is no folder; give a folder with config.json or a hub id 'owner/name'")
    folder = _fetch(name, SMALL)
    if weights:
        _fetch(name, [*_weight_files(folder), *BESIDE])
        if not any(folder.glob("*.safetensors")):
            _refuse(name)
    return folder


def _weight_files(folder: Path) -> list[str]:
    """The files that hold the weights, by the index if the repository has one."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: it has no weight_map that can be read ({error!r})") from error
    return sorted(set(files))


def _fetch(name: str, patterns: list[str]) -> Path:
    """Downloads what is missing of a repository's top folder; returns where it lies."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    bar: dict[str, Any] = {} if sys.stderr.isatty() else {"tqdm_class": _plain_bar()}
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"], **bar))
    except GatedRepoError as error:
        reason = f"asks for consent: accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        raise FileNotFoundError(f"the hub's {name} {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "check the spelling; a private one needs `hf auth login`"
        raise FileNotFoundError(f"{name!r} is no folder here, and the hub shows you no such model: {reason}") from error
    except HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is no folder here and no hub id 'owner/name': {error}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(_offline(name, error)) from error
    except Exception as error:  # the client's own network errors have no common base, and change with its version
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it ({type(error).__name__}: {error}); try again, "
            f"or {_by_hand(name)}"
        ) from error


def _offline(name: str, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        cause = "HF_HUB_OFFLINE is set, so nothing is downloaded"
        way_out = "take HF_HUB_OFFLINE away"
    else:
        cause = f"the hub cannot be reached ({str(error.__cause__ or error).splitlines()[0]})"
        way_out = "check the connection"
    return (
        f"{name!r} is no folder here and not complete in the hub's cache, and {cause}; {way_out}, or {_by_hand(name)}"
    )


def _by_hand(name: str) -> str:
    return f"run `hf download {name} --local-dir FOLDER` where there is a connection and give that FOLDER"


def _refuse(name: str) -> None:
    """A repository without the safetensors that are wanted."""
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name)
    except Exception as error:  # offline with a cached repository: what else it holds cannot be asked
        log.debug("the files of %s cannot be listed: %s", name, error)
        files = []
    others = [file for file in files if file.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt"))]
    has = f"; it has {', '.join(others[:5])}" if others else ""
    raise FileNotFoundError(
        f"the hub's {name} has neither {SINGLE} nor {INDEX}{has}; pickles can run code and are not opened: "
        "convert the model to safetensors"
    )


def _plain_bar() -> Any:
    """A tqdm that writes a line now and then instead of redrawing one."""
    from huggingface_hub.utils import tqdm

    class Lines(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # What tqdm itself writes, to move the cursor, goes nowhere.
            super().__init__(*args, **options | {"file": StringIO()})

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            now, complete = time.monotonic(), bool(self.total) and self.n >= self.total
            if complete or now - getattr(self, "shown_at", -SECONDS_BETWEEN_LINES) >= SECONDS_BETWEEN_LINES:
                self.shown_at = now
                size = self.format_sizeof if self.unit == "B" else str
                print(f"{self.desc}: {size(self.n)} of {size(self.total or 0)}", file=sys.stderr, flush=True)

    return Lines
