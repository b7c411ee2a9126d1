"""Sharded weights, and full weights on several processes: both train what one process trains."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import same_tensors, tiny_model, weights_of
from commands import good, neo
from safetensors.torch import load_file
from sharded_child import make_run
from test_bypass import around
from torch.distributed import checkpoint as dcp

from neo_components.training.checkpoints import read_checkpoint
from neo_components.training.fsdp2.checkpoints import CONTENTS, read_contents

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
        assert a == pytest.approx(b, abs=tolerance, rel=tolerance, nan_ok=True)
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


@pytest.fixture(scope="module")
def two(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Any]:
    """One start of two processes, in a folder: the cases, and what each process made of them."""
    folder = tmp_path_factory.mktemp("two")
    cases: list[dict[str, Any]] = [
        {"folder": models["plain"], "strategy": "ddp"},
        {"folder": models["plain"], "strategy": "fsdp2", "save": str(folder / "two.ckpt")},
        {"folder": models["tied"], "strategy": "fsdp2", "activation_checkpointing": 1.0},
        {"folder": models["bypass"], "strategy": "fsdp2", "ema": 0.5, "weights": str(folder / "two.safetensors")},
        {"folder": models["plain"], "strategy": "fsdp2", "train": STAGE_1, "poisoned": 1},
        {"folder": models["plain"], "strategy": "fsdp2", "precision": "bf16-mixed"},
    ]
    return folder, cases, runs(2, folder, cases)


@pytest.mark.timeout(900)  # the fixture's time counts
def test_two_processes_train_what_one_does(two: tuple[Path, list[dict[str, Any]], Any], tmp_path: Path) -> None:
    """Packed rows of unequal learnt tokens, one process without any image: losses, norms before and after clipping,
    validation; also a step that is not finite, and averaged weights."""
    folder, cases, (first, second) = two
    for case, here, there in zip(cases[:-1], first, second, strict=False):
        weights = str(tmp_path / "one.safetensors") if "weights" in case else None
        alone = make_run(**case | {"strategy": "auto", "weights": weights, "save": None})
        assert alone["steps"][0]["train/grad_norm"] > 0.5 == pytest.approx(alone["clipped"], abs=1e-5)
        assert alone["steps"][-1]["train/skipped_steps"] == ("poisoned" in case)
        for result in (here, there):
            close(result, alone)
            share = 1.0 if case["strategy"] == "ddp" else 0.5
            assert result["held"] == pytest.approx(share, abs=0.02)
    averaged, expected = load_file(folder / "two.safetensors"), load_file(tmp_path / "one.safetensors")
    assert all(torch.allclose(averaged[name], tensor, atol=1e-4) for name, tensor in expected.items())
    one, other = first[-1]["steps"][0]["train/loss"], first[1]["steps"][0]["train/loss"]
    assert one == pytest.approx(other, rel=0.02) and one != other


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_four_processes_save_and_two_go_on(models: dict[str, str], tmp_path: Path) -> None:
    """And one: the losses are those of four that were never stopped, and of one process."""
    plain, saved = {"folder": models["plain"], "strategy": "fsdp2"}, str(tmp_path / "four.ckpt")
    weights = {n: str(tmp_path / f"{n}.safetensors") for n in (1, 2, 4)}
    [whole, begun, ddp], *others = runs(
        4,
        tmp_path,
        [plain | {"weights": weights[4]}, plain | {"steps": [0, 2], "save": saved}, plain | {"strategy": "ddp"}],
    )
    assert all(result[0]["steps"] == whole["steps"] for result in others)
    alone = make_run(models["plain"])
    close(whole, alone)
    close(ddp, alone)
    assert whole["held"] == pytest.approx(0.25, abs=0.03)
    for ranks in (2, 1):
        again = plain | {"steps": [2, 4], "resume": saved, "weights": weights[ranks]}
        [resumed] = runs(ranks, tmp_path, [again])[0]
        close({**resumed, "steps": [*begun["steps"], *resumed["steps"]]}, whole)
        state, expected = load_file(weights[ranks]), load_file(weights[4])
        for name, tensor in expected.items():
            assert torch.allclose(state[name], tensor, atol=1e-4), name


def test_a_damaged_sharded_checkpoint_is_told(
    models: dict[str, str], two: tuple[Path, list[dict[str, Any]], Any]
) -> None:
    """A flipped bit, a cut file and a list of contents that names a function."""
    saved = two[0] / "two.ckpt"
    meta = read_checkpoint(saved)
    assert meta["global_step"] == 4
    shapes = {name: tensor.shape for name, tensor in meta["state_dict"].items()}
    assert shapes == {f"model.{name}": tensor.shape for name, tensor in weights_of(Path(models["plain"])).items()}
    [rows] = saved.glob("__1_*")
    good = rows.read_bytes()
    rows.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :])
    with pytest.raises(ValueError, match=r"two.ckpt is no checkpoint of a training run"):
        read_checkpoint(saved)
    rows.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="or it is damaged"):
        read_checkpoint(saved, thorough=False)
    rows.write_bytes(good)
    (saved / CONTENTS).write_bytes(pickle.dumps(os.system))
    with pytest.raises(ValueError, match=r"must not name posix\.system"):
        read_contents(saved)


# --- recipes


def train(ranks: int, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    neo = Path(sys.executable).with_name("neo")
    done = torchrun(ranks, neo, "train", *arguments, f"trainer.devices={ranks}", folder=folder, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def stored(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's tensors in a sharded checkpoint, put together without any process group."""
    contents = {name: torch.empty(entry.size) for name, entry in read_contents(checkpoint).items()}
    kept = {name: tensor for name, tensor in contents.items() if name.startswith("model.")}
    dcp.load(kept, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix("model.model."): tensor for name, tensor in kept.items()}


@pytest.mark.timeout(900)
def test_one_recipe_under_torchrun(world: Path, tmp_path: Path) -> None:
    """New weights are those of one process; the folder is put together from what the processes hold; and it goes on."""
    overrides = [str(world / "run.yaml"), "stage.validate_every=2", "stage.predictions=2", "stage.whiten_patches=256"]
    overrides += [f"data.validation=[{{shards: {world}/shards}}]", f"output={tmp_path}/run"]
    done = train(2, *overrides, "trainer.strategy=fsdp2", "--resume", "auto", folder=tmp_path)
    assert done.stdout.count("model: ") == 1 and "exact match: " in done.stdout
    made, held = weights_of(tmp_path / "run" / "neo"), stored(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert same_tensors(made, held)
    good("export", tmp_path / "run", "-o", tmp_path / "asset")
    asset = weights_of(tmp_path / "asset")
    assert all(torch.equal(tensor, held[f"pre_buffer.{name}"]) for name, tensor in asset.items())
    # The frozen language model is bit for bit that of the folder; what learns began as in one process.
    alone = good("train", *overrides, f"output={tmp_path}/alone", "stage.lr=0")
    begun = weights_of(tmp_path / "alone" / "neo")
    assert "model: " in alone and len(begun) == len(made)
    for name, tensor in begun.items():
        moved = name.startswith("pre_buffer.")
        assert torch.allclose(made[name], tensor, atol=2e-3) if moved else torch.equal(made[name], tensor), name
    again = train(2, *overrides, "trainer.strategy=fsdp2", "stage.steps=3", "--resume", "auto", folder=tmp_path)
    assert "model: " in again.stdout
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_what_is_exported_is_the_same_from_any_number_of_processes(world: Path, tmp_path: Path) -> None:
    """One trained model goes through runs that change nothing, whole in 1, 2 and 4 processes and divided among 2 and 4:
    all leave the same asset, bit for bit."""
    train(2, str(world / "run.yaml"), f"output={tmp_path}/run", "trainer.strategy=ddp", folder=tmp_path)
    text = (world / "run.yaml").read_text()
    parts = text[text.index("model:") : text.index("stage:")]
    again = tmp_path / "again.yaml"
    again.write_text(text.replace(parts, f"model: {{from_pretrained: {tmp_path}/run/neo}}\n"))
    good("export", tmp_path / "run", "-o", tmp_path / "asset")
    asset = weights_of(tmp_path / "asset")
    for ranks, strategy in ((1, "auto"), (2, "ddp"), (4, "ddp"), (2, "fsdp2"), (4, "fsdp2")):
        name = f"{strategy}{ranks}"
        still = ["stage.lr=0", f"trainer.strategy={strategy}", f"output={tmp_path}/{name}"]
        train(ranks, str(again), *still, folder=tmp_path)
        good("export", tmp_path / name, "-o", tmp_path / f"asset-{name}")
        assert same_tensors(weights_of(tmp_path / f"asset-{name}"), asset), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp2 shards them"),
        ("trainer.strategy=deepspeed_stage_3", "cannot be exported"),
        ("stage.optimizer=muon", "muon orthogonalizes full matrices"),
        ("trainer.precision=16-mixed", "use one of 32-true, bf16-mixed"),
    ],
)
def test_what_does_not_go_is_told_before_anything_is_loaded(world: Path, override: str, message: str) -> None:
    first = [] if "strategy" in override else ["trainer.strategy=fsdp2"]
    done = neo("train", world / "run.yaml", *first, override)
    assert done.status == 1 and message in done.err


def test_a_checkpoint_of_the_other_kind_is_refused(world: Path, tmp_path: Path) -> None:
    recipe = [world / "run.yaml", f"output={tmp_path}"]
    good("train", *recipe)
    done = neo("train", *recipe, "stage.steps=3", "trainer.strategy=fsdp2", "--resume", "last")
    assert done.status == 1 and "is a full checkpoint; resume with the strategy of its run" in done.err
