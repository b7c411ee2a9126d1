"""Writes a whole pretraining mix: packages first, then one folder of shards after the other, then the data card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path

from neo_components.data.convert.base import Converter
from neo_components.data.convert.engine import convert_to_shards
from neo_components.data.convert.pretrain_card import CARD, write_card
from neo_components.data.convert.pretrain_mix import VALIDATION, PretrainMix, complete_weights, source
from neo_components.data.convert.pretrain_texts import PretrainTexts
from neo_components.data.pictures.packages import prepare
from neo_components.data.pictures.picture import HELD_OUT, TRAIN
from neo_components.data.shards.format import INDEX_NAME
from neo_components.registry import PICTURES

TEXT = "train_text"
TEXT_RATIO = 3 / 7
"""Samples of text alone to samples with an image (NEO, section 3.2: 3:7)."""
VALIDATION_PAIRS = 2_000
JOB = "mix.json"
"""What the folder holds, so that another mix is not written into it."""


def write_mix(
    folder: str | PathLike[str],
    packages: str | PathLike[str],
    *,
    pairs: int = 300_000,
    held_out: int = 1_000,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    fetch: bool = False,
    workers: int = 0,
    report: Callable[[str], None] = print,
) -> int:
    """Writes a mix; started again with the same arguments, it goes on where it stopped.

    Args:
        folder: of the mix: ``train``, ``train_text``, ``validation``, ``held_out/SOURCE`` and the data card.
        packages: folder of the packages.
        pairs: images of the train part.
        held_out: images of each source in the held-out part.
        seed: the same seed gives the same shards.
        weights: sampling weights by source.
        fetch: download packages that are missing.
        workers: processes that write.
        report: takes a line of progress.

    Returns:
        number of samples in all folders.

    Raises:
        FileExistsError: if the folder holds a mix of other arguments.
        FileNotFoundError: if a package is missing and ``fetch`` is false.
        ValueError: if a source or a number is not possible.
    """
    folder, packages = Path(folder), Path(packages)
    complete = complete_weights(weights or {})
    job = {"pairs": pairs, "held_out": held_out, "seed": seed, "weights": complete}
    _open(folder, job)
    needs = {name for part in used(complete) for name in PICTURES[part].needs}
    prepare(packages, sorted(needs.union(PretrainTexts.needs)), fetch, report)
    for part, converter in _parts(packages, pairs, held_out, seed, complete):
        if (folder / part / INDEX_NAME).is_file():
            report(f"{part}: finished before")
            continue
        convert_to_shards(converter, folder / part, workers=workers, title=part)
    named = [f"--pairs {pairs}", f"--held-out {held_out}", f"--seed {seed}"]
    named += [f"--weight {name}={weight:g}" for name, weight in (weights or {}).items()]
    command = f"neo data pretrain-mix {shlex.quote(folder.name)} --packages PACKAGES {' '.join(named)}"
    write_card(folder, packages, {name: complete[name] for name in used(complete)}, seed, command)
    counted = json.loads((folder / CARD).read_text(encoding="utf-8"))["folders"]
    return sum(numbers["samples"] for part in counted.values() for numbers in part.values())


def used(weights: Mapping[str, float]) -> list[str]:
    """The sources of a mix."""
    return [name for name, weight in weights.items() if weight]


def _parts(
    packages: Path, pairs: int, held_out: int, seed: int, weights: Mapping[str, float]
) -> Iterator[tuple[str, Converter]]:
    """Folders and their converters, those that are looked at first at the beginning."""
    yield VALIDATION, PretrainMix(packages, min(VALIDATION_PAIRS, pairs), VALIDATION, seed, weights)
    for name in used(weights):
        if held_out and source(name, packages).items(HELD_OUT) != 0:
            only = {other: float(other == name) for other in PICTURES}
            yield f"{HELD_OUT}/{name}", PretrainMix(packages, held_out, HELD_OUT, seed, only)
    yield TRAIN, PretrainMix(packages, pairs, TRAIN, seed, weights)
    yield TEXT, PretrainTexts(packages, max(1, round(pairs * TEXT_RATIO)), seed)


def _open(folder: Path, job: Mapping[str, object]) -> None:
    known = folder / JOB
    if known.is_file():
        if (found := json.loads(known.read_text(encoding="utf-8"))) != job:
            raise FileExistsError(
                f"{folder} holds another mix ({found}); wanted is {dict(job)}: write to another folder, or remove it"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no mix; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(job), encoding="utf-8")
