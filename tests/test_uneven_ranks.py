"""Ranks whose batches have no image, nothing to learn, or nothing at all never leave another one waiting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from uneven_ranks import KINDS, MODELS, RANKS, batch_of

from neo_components.recipe.stage import StageConfig
from neo_components.training.module import NEOTraining


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_batch_reaches_every_parameter(name: str) -> None:
    """A parameter without a gradient on one rank is what makes the others wait."""
    make, options = MODELS[name]
    for kind in KINDS:
        module = NEOTraining(make(), StageConfig(**({"train": ("all",), "steps": 1} | options)))
        module.train()
        for seed in range(3):
            module.zero_grad()
            module.model.loss(batch_of(kind, module.model.input_spec, seed)).backward()
            assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == [], kind


def stress(steps: int, folder: Path, names: list[str]) -> None:
    script = str(Path(__file__).with_name("uneven_ranks.py"))
    command = [sys.executable, "-W", "ignore", script, str(steps), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in names:
        ends = [json.loads((folder / name).with_suffix(f".{rank}.json").read_text()) for rank in range(RANKS)]
        assert ends[0]["steps"] == steps and ends[0]["skipped"] == 0
        assert ends[0] == ends[1]  # the same weights on both ranks


def test_two_ranks_of_different_kinds_of_batches(tmp_path: Path) -> None:
    stress(25, tmp_path, ["plain", "bypass"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_thousands_of_steps_of_different_kinds_of_batches(name: str, tmp_path: Path) -> None:
    stress(1500, tmp_path, [name])
