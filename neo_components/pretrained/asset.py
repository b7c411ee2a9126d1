"""Export of a part's pre-Buffer, and of the asset with its card: data, licenses, steps and scores."""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from neo_components.components.pre_buffer import AssetInfo
from neo_components.data.convert.pretrain_card import CARD
from neo_components.data.pictures.picture import HELD_OUT
from neo_components.evaluation import OVERALL, evaluate, questions_from_shards
from neo_components.model.attach import export_pre_buffer, provenance_of
from neo_components.model.chat import Chat
from neo_components.pretrained import smollm2
from neo_components.pretrained.job import MIX, Making
from neo_components.storage.weights import read_json

LICENSE = "apache-2.0"
ANCHORS = 4096
ASKED = 50
"""Questions of each held-out source that the finished model answers."""


def export_part(job: Making, part: str, folder: Path) -> None:
    """Exports the pre-Buffer of a part, for the next one.

    Args:
        job: of the parts.
        part: name of a trained one.
        folder: is made at the end, so that it is there whole or not at all.
    """
    chat = Chat.from_pretrained(job.out / part / "neo", device=job.device)
    _write(job, part, chat, {"stages": _stages(job)}, folder)


def export_asset(job: Making, folder: Path) -> None:
    """Exports the pre-Buffer of the last part in float16, with data, licenses and scores.

    Args:
        job: all of whose parts are trained.
        folder: is made at the end, so that it is there whole or not at all.
    """
    part = job.parts[-1]
    chat = Chat.from_pretrained(job.out / part / "neo", device=job.device)
    provenance = {"stages": _stages(job)} | _facts(job) | {"scores": _scores(job, chat)}
    chat.model.pre_buffer.half()
    _write(job, part, chat, provenance, folder)


def _write(job: Making, part: str, chat: Chat, provenance: dict[str, Any], folder: Path) -> None:
    arriving = folder.with_name(folder.name + ".part")
    shutil.rmtree(arriving, ignore_errors=True)
    info = AssetInfo(chat.image_config(), provenance, LICENSE)
    export_pre_buffer(chat.model.cpu(), arriving, job.out / part / "neo", ANCHORS, info)
    arriving.rename(folder)


def _stages(job: Making) -> list[Any]:
    """Of all parts so far; a part that goes on with the model of another one repeats its stages."""
    stages: list[Any] = []
    for part in job.parts:
        stages += [s for s in provenance_of(job.out / part / "neo").get("stages", []) if s not in stages]
    return stages


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
