"""Weights written one by one, for models that are never in one memory in full: one file, or several with an index."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from neo_components.storage.weights import WEIGHTS, save_tensors, write_text

LARGEST_FILE = 5 * 10**9
"""Bytes of tensors in one file; as many are in memory at a time."""


class WeightWriter:
    """Writes a folder's weights as ``TensorFiles`` reads them; files of an earlier save are replaced at the end.

    Args:
        folder: made if absent.
        largest: bytes of tensors in one file. What fits into one is named model.safetensors, as everywhere else.
    """

    def __init__(self, folder: Path, largest: int = LARGEST_FILE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._largest = folder, largest
        self._parts: list[list[str]] = []
        self._waiting: dict[str, Tensor] = {}
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes the next tensor, on any device."""
        if self._waiting and self._bytes + tensor.nbytes > self._largest:
            self._write()
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def _write(self) -> None:
        save_tensors(self._folder / f"part-{len(self._parts)}.unfinished", self._waiting)
        self._parts.append(list(self._waiting))
        self._waiting, self._bytes = {}, 0

    def close(self) -> None:
        """Writes what is left, gives the files their names, and removes those of an earlier save."""
        self._write()
        count = len(self._parts)
        stem = WEIGHTS.removesuffix(".safetensors")
        names = [f"{stem}-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else [WEIGHTS]
        index = self._folder / f"{WEIGHTS}.index.json"
        for old in [self._folder / WEIGHTS, *self._folder.glob(f"{stem}-*-of-*.safetensors"), index]:
            if old.name not in names:
                old.unlink(missing_ok=True)
        for number, name in enumerate(names):
            (self._folder / f"part-{number}.unfinished").replace(self._folder / name)
        if count > 1:
            weight_map = {tensor: name for name, part in zip(names, self._parts, strict=True) for tensor in part}
            text = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(index, json.dumps(text, indent=2) + "\n")
