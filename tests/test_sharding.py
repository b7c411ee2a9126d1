"""Weights divided among processes, and whole ones on several: both train what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model, weights_of
from sharded_child import make_run
from test_bypass import around

TESTS = Path(__file__).parent


def torchrun(ranks: int, *arguments: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Starts a program in several processes, as torchrun does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    own = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(list(map(str, command)), cwd=folder, env=own, capture_output=True, text=True, check=False)


def runs(ranks: int, folder: Path, plan: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The results of a plan's runs, for each of the processes."""
    path = folder / f"plan{ranks}.json"
    path.write_text(json.dumps(plan))
    done = torchrun(ranks, TESTS / "sharded_child.py", path, folder=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.with_name(f"{path.stem}.rank{rank}.json").read_text()) for rank in range(ranks)]


def close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Losses and norms of all steps."""
    assert len(one["steps"]) == len(other["steps"])
    for a, b in zip(one["steps"], other["steps"], strict=True):
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance)
    assert one["val_loss"] == pytest.approx(other["val_loss"], abs=tolerance)
    assert one["clipped"] == pytest.approx(other["clipped"], abs=tolerance)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of three models: plain, with tied embeddings and uneven rows, and with words around the pre-Buffer."""
    root = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(root / "plain")
    # 61 rows of the vocabulary and heads of 4 do not divide evenly among processes.
    tiny_model(post={"tie_embeddings": True, "vocab_size": 61}).save_pretrained(root / "tied")
    around(width=24).save_pretrained(root / "bypass")
    return {path.name: str(path) for path in root.iterdir()}


STAGE_1 = ("patch_embedding", "pre_buffer", "post_llm.hw")


def test_two_processes_train_what_one_does(models: dict[str, str], tmp_path: Path) -> None:
    """Packed rows of unequal learnt tokens, one process without any image: losses, norms before and after clipping,
    validation and weights."""
    cases: list[dict[str, Any]] = [
        {"folder": models["plain"]},
        {"folder": models["tied"], "recompute": 1.0},
        {"folder": models["bypass"]},
        {"folder": models["plain"], "train": STAGE_1, "poisoned": 1},
    ]
    plan = [
        case | {"strategy": strategy, "weights": str(tmp_path / f"{strategy}-{n}.safetensors")}
        for n, case in enumerate(cases)
        for strategy in ("ddp", "fsdp2")
    ]
    plan.append({"folder": models["plain"], "strategy": "fsdp2", "precision": "bf16-mixed"})
    first, second = runs(2, tmp_path, plan)
    for n, case in enumerate(cases):
        alone = make_run(**case | {"weights": str(tmp_path / f"alone-{n}.safetensors")})
        assert alone["steps"][0]["train/grad_norm"] > 0.5 == pytest.approx(alone["clipped"], abs=1e-5)
        for place in (2 * n, 2 * n + 1):
            close(first[place], alone)
            assert first[place]["steps"] == second[place]["steps"]
        assert alone["steps"][-1]["train/skipped_steps"] == ("poisoned" in case)
        for result in (first, second):
            assert result[2 * n]["held"] == 1.0 and result[2 * n + 1]["held"] == pytest.approx(0.5, abs=0.02)
    rounded = first[-1]
    assert rounded["steps"][0]["train/loss"] == pytest.approx(first[1]["steps"][0]["train/loss"], rel=0.02)
    assert rounded["steps"][0] != first[1]["steps"][0]


def test_what_one_process_saved_of_four_two_go_on_with() -> None:
    pass


def test_names() -> None:
    assert torch.__version__ and weights_of
