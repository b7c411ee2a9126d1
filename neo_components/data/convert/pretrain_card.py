"""The data card of a pretraining mix: sources, licenses, counts, what is held out, and the command."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from neo_components.data.convert.pretrain_mix import source
from neo_components.data.convert.pretrain_texts import PretrainTexts
from neo_components.data.pictures.packages import PACKAGES
from neo_components.data.pictures.picture import HELD_OUT, TRAIN
from neo_components.data.shards.format import INDEX_NAME
from neo_components.registry import PICTURES

CARD = "card.json"


def write_card(folder: Path, packages: Path, weights: dict[str, float], seed: int, command: str) -> None:
    """Writes ``card.json`` and ``README.md`` into the folder of a mix.

    Args:
        folder: that holds the finished folders of shards.
        packages: folder of the packages.
        weights: sampling weights by source.
        seed: of the mix.
        command: as it was typed.
    """
    counts = {
        index.parent.relative_to(folder).as_posix(): _counted(index) for index in sorted(folder.rglob(INDEX_NAME))
    }
    sources = {
        name: {
            "origin": PICTURES[name].origin,
            "license": PICTURES[name].license,
            "weight": weight,
            "things_train": source(name, packages).items(TRAIN),
            "things_held_out": source(name, packages).items(HELD_OUT),
            "packages": list(PICTURES[name].needs),
        }
        for name, weight in weights.items()
    }
    needed = sorted({package for name in weights for package in PICTURES[name].needs}.union(PretrainTexts.needs))
    facts = {
        "command": command,
        "seed": seed,
        "sources": sources,
        "packages": {
            name: {key: getattr(PACKAGES[name], key) for key in ("version", "license", "url", "sha256", "bytes")}
            for name in needed
        },
        "folders": counts,
    }
    (folder / "README.md").write_text(_readme(facts), encoding="utf-8")
    writing = folder / f"{CARD}.writing"
    writing.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    writing.replace(folder / CARD)  # last, and at once: a mix with it is whole


def _counted(index: Path) -> dict[str, dict[str, int]]:
    """Samples and answers of a folder by source, from the keys of its index."""
    samples = json.loads(index.read_bytes())["samples"]
    pairs: Counter[str] = Counter()
    turns: Counter[str] = Counter()
    for sample in samples:
        name = sample["key"].rpartition("-")[0]
        pairs[name] += 1
        turns[name] += sample["turns"] // 2
    return {name: {"samples": pairs[name], "answers": turns[name]} for name in sorted(pairs)}


def _readme(facts: dict[str, Any]) -> str:
    lines = [
        "# Pretraining mix",
        "",
        f"Written by `{facts['command']}`, seed {facts['seed']}. `card.json` has these tables as data.",
        "",
        "`train` and `validation` hold images with one to four questions each, `train_text` text alone, and",
        "`held_out/SOURCE` questions on material that no image of `train` shows: other drawings, a whole set of icons,",
        "whole font families.",
        "",
        "| folder | source | samples | answers |",
        "|---|---|---|---|",
    ]
    for folder, counted in facts["folders"].items():
        lines += [f"| {folder} | {name} | {n['samples']} | {n['answers']} |" for name, n in counted.items()]
    lines += ["", "| source | origin | license | things in train | held out |", "|---|---|---|---|---|"]
    for name, source_facts in facts["sources"].items():
        things = [source_facts[key] for key in ("things_train", "things_held_out")]
        shown = ["without end" if number is None else str(number) for number in things]
        lines.append(f"| {name} | {source_facts['origin']} | {source_facts['license']} | {' | '.join(shown)} |")
    lines += ["", "| package | version | license | file |", "|---|---|---|---|"]
    for name, package in facts["packages"].items():
        lines.append(f"| {name} | {package['version']} | {package['license']} | {package['url']} |")
    return "\n".join([*lines, ""])
