"""How long each sample of a folder is, in tokens: counted once for each tokenizer and image limits, then kept.

Lengths lie beside the shards in ``lengths-FINGERPRINT.npy``, [3, samples] int32: tokens (0 if the sample cannot be
used), how many of them are visual, and why it cannot be used. The fingerprint is that of everything they depend on, so
lengths of another tokenizer are never taken for these. Where the folder cannot be written they are kept in the cache
folder of the user (``NEO_COMPONENTS_CACHE``, or ``~/.cache/neo_components``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from neo_components.data.plan.pack_plan import Supply
from neo_components.data.samples import SampleMaker
from neo_components.data.shards.folder import ShardFolder
from neo_components.data.shards.remote import cache_folder
from neo_components.data.skip_counts import REASONS, SampleError, SkipCounts
from neo_components.storage.progress import progress
from neo_components.types import plain_layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

VERSION = 1
"""Changes when the same conversation becomes other tokens, so that lengths kept from before are not used."""

GRIDS = [(rows, columns) for rows in range(1, 9) for columns in range(1, 9)]
"""Sizes of images that tell two layouts apart."""
CHUNK = 256
SHOWN_FROM = 5000
"""Samples of a folder from which on counting shows its progress."""

_REASONS = sorted(REASONS)
_Fault = tuple[int, str, str]
"""number of the sample, message, reason"""


@dataclass(frozen=True)
class Lengths:
    """Lengths of a folder's samples for one tokenizer and one set of image limits.

    Args:
        name: of the folder.
        table: [3, samples] int32, see above.
        shard_sizes: [shards] samples in each shard.
    """

    name: str
    table: np.ndarray
    shard_sizes: np.ndarray

    @property
    def supply(self) -> Supply:
        """What packing is planned from."""
        return Supply(self.name, self.table[0], self.table[1], self.shard_sizes)

    def counts(self, seq_len: int) -> SkipCounts:
        """All samples and why some of them cannot be used, those longer than a packed sequence included."""
        counts = np.bincount(self.table[2], minlength=len(_REASONS) + 1)
        skipped = Counter({_REASONS[code - 1]: int(counts[code]) for code in np.flatnonzero(counts[1:]) + 1})
        if too_long := int((self.table[0] > seq_len).sum()):
            skipped["too_long"] += too_long
        return SkipCounts(self.table.shape[1], skipped)

    def reason(self, number: int) -> str | None:
        """Why a sample cannot be used; ``None`` if it can."""
        code = int(self.table[2, number])
        return _REASONS[code - 1] if code else None


def folder_lengths(folder: ShardFolder, maker: SampleMaker, workers: int = 0) -> Lengths:
    """Lengths of a folder's samples: read if they are kept, else counted and kept.

    Args:
        folder: the samples.
        maker: how they become tokens.
        workers: processes that count; 0 counts in this one.
    """
    name = f"lengths-{fingerprint(folder, maker)[:20]}.npy"
    elsewhere = cache_folder() / "lengths"
    for file in (folder.kept(name), elsewhere / name):
        if file is not None and file.is_file() and (known := _read(file, len(folder))) is not None:
            return Lengths(folder.address, known, folder.shard_sizes)
    table = _count(folder, maker, workers)
    for target in (folder.folder, elsewhere):
        try:
            target.mkdir(parents=True, exist_ok=True)
            _write(target / name, table)
            break
        except OSError as error:
            logger.warning("the lengths of %s cannot be kept in %s (%s)", folder.folder, target, error)
    return Lengths(folder.address, table, folder.shard_sizes)


def fingerprint(folder: ShardFolder, maker: SampleMaker) -> str:
    """Of everything that the lengths depend on."""
    facts = {
        "version": VERSION,
        "tokenizer": _tokenizer_hash(maker.tokenizer),
        "images": [maker.spec.factor, maker.min_pixels, maker.max_pixels],
        "max_length": maker.max_length,
        "reasons": _REASONS,
        "folder": folder.signature(),
    }
    if maker.spec.image_layout is not plain_layout:
        facts["layout"] = [len(maker.spec.image_layout(rows, columns)) for rows, columns in GRIDS]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    own = [type(tokenizer).__name__, str(getattr(tokenizer, "chat_template", None)), rules]
    return hashlib.sha256("\n".join(own).encode()).hexdigest()


def _read(file: Path, samples: int) -> np.ndarray | None:
    """The table of a file; ``None`` if it is damaged."""
    try:
        table: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        table = np.zeros(0)
    if table.shape == (3, samples) and table.dtype == np.int32:
        return table
    logger.warning("%s is damaged; the lengths are counted again", file)
    return None


def _write(path: Path, table: np.ndarray) -> None:
    """All or nothing: another process may read it at any time."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _count(folder: ShardFolder, maker: SampleMaker, workers: int) -> np.ndarray:
    table = np.zeros((3, len(folder)), np.int32)
    chunks = _Chunks(folder, maker)
    few = len(folder) < SHOWN_FROM
    # Its own generator: counting must not draw from the random numbers of a run.
    options: dict[str, Any] = {"collate_fn": _as_it_is, "generator": torch.Generator()}
    loader = DataLoader(chunks, batch_size=None, num_workers=0 if few else workers, **options)
    with progress(None if few else f"lengths of {folder.folder}", total=len(folder)) as bar:
        done = 0
        for part, faults in loader:
            table[:, done : done + part.shape[1]] = part
            done += part.shape[1]
            for number, message, reason in faults:
                logger.warning("skipped sample %s (%s): %s", folder.name(number), reason, message)
            bar.advance(part.shape[1])
    return table


def _as_it_is(chunk: Any) -> Any:
    return chunk


class _Chunks(Dataset[tuple[np.ndarray, list[_Fault]]]):
    """Some neighboring samples at a time."""

    def __init__(self, folder: ShardFolder, maker: SampleMaker) -> None:
        self._folder, self._maker = folder, maker

    def __len__(self) -> int:
        return -(-len(self._folder) // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[np.ndarray, list[_Fault]]:
        if chunk >= len(self):
            raise IndexError(chunk)
        numbers = range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(self._folder)))
        table, faults = np.zeros((3, len(numbers)), np.int32), []
        for column, number in enumerate(numbers):
            try:
                table[:2, column] = self._length(number)
            except SampleError as error:
                table[2, column] = 1 + _REASONS.index(error.reason)
                faults.append((number, str(error), error.reason))
        return table, faults

    def _length(self, number: int) -> tuple[int, int]:
        """Tokens, and how many of them are visual."""
        maker = self._maker
        if self._folder.indexed:  # the images were opened when the index was written
            raw, sizes = self._folder.outline(number)
            resized = maker.resized(sizes)
            return len(maker.encode(raw, resized)[0]), maker.visual_tokens(resized)
        draft = maker.draft(self._folder.read(number))
        return len(draft.token_ids), maker.visual_tokens(draft.sizes)
