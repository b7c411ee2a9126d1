"""The main job, run once at small scale by the real command: what it leaves is whole and means what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import weights_of
from commands import good
from PIL import Image

from neo_components import NEO, PostLLM, PreBuffer, load_recipe
from neo_components.devices import describe, find_training_device
from neo_components.evaluation import questions_from_shards
from neo_components.model.chat import Chat
from neo_components.quickstart.main import MADE, MARK, _clear, run
from neo_components.recipe import build, list_recipes
from neo_components.storage.weights import read_json
from neo_components.training.groups import train_only

KINDS = {"overall", "shape", "color", "yes_no"}
STEPS = {"data", "llm", "training", "evaluation", "reuse", "report"}


@pytest.fixture
def figures(quickstart: Path) -> dict[str, Any]:
    return json.loads((quickstart / "report.json").read_text())


def test_steps_are_announced_and_progress_is_shown(quickstart: Path) -> None:
    out, err = ((quickstart.parent / f"{name}.txt").read_text() for name in ("stdout", "stderr"))
    device, *steps, report, ask = out.splitlines()
    assert re.fullmatch(r"device .+, training precision bf16-mixed, evaluation 32-true", device)
    assert [line[:6] for line in steps] == [f"[{n}/6] " for n in range(1, 7)]
    assert report == "report: out/report.md"
    assert ask == 'ask: neo chat out/neo --image X.png "what color is the shape?"'
    done = [line.split(":")[0] for line in err.splitlines() if "(100 %)" in line]
    assert [title for title in done if not title.startswith("lengths of ")] == [
        "LLM", "second LLM", "pre-training", "mid-training", "sft", "test split", "shuffled images", "text-only LLM",
        "attached", "test split, reused", "random pre-Buffer", "test split, random",
    ]  # fmt: skip
    assert "Traceback" not in err and "Warning" not in err


# --- what the steps leave


STEPPED = [recipe.name for recipe in list_recipes() if not recipe.name.startswith(("reuse/", "pretrained/"))]
"""Shipped recipes that the main job runs; test_reuse_recipes.py and test_pretrained_make.py step the others."""


@pytest.mark.parametrize("name", STEPPED)
def test_every_shipped_recipe_was_built_and_stepped(quickstart: Path, name: str) -> None:
    """A recipe that the main job does not run needs a test of its own that steps it, as tests/test_reuse_recipes.py."""
    output = Path(load_recipe(name, [f"variables.root={quickstart}"]).output)
    recipe = load_recipe(output / "recipe.yaml")
    model = NEO.from_pretrained(output / "neo")
    saved = torch.load(output / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == recipe.stage.steps >= 2
    trained = {id(parameter) for parameter in train_only(model, recipe.stage.train)}
    moved = {n for n, parameter in model.named_parameters() if id(parameter) in trained}
    kept = {f"model.{n}": tensor for n, tensor in model.state_dict().items()}
    assert set(kept) == set(saved["state_dict"])
    assert all(torch.equal(tensor, kept[n]) for n, tensor in saved["state_dict"].items())
    assert moved and all(tensor.isfinite().all() for tensor in kept.values())
    last = read_json(output / "neo" / "provenance.json")["stages"][-1]
    assert (last["stage"], last["trained"]) == (recipe.stage.name, list(recipe.stage.train))
    assert last["metrics"]["val/loss"] > 0
    assert list((output / "logs").glob("events.*")) and list((output / "figures").glob("answers-*.png"))


def test_the_three_stages_follow_each_other(quickstart: Path) -> None:
    """Pre-training leaves the language model as it was; each later stage changes what the one before it left."""
    stages = read_json(quickstart / "neo" / "provenance.json")["stages"]
    assert [stage["stage"] for stage in stages] == ["pre-training", "mid-training", "sft"]
    first, second, third = (weights_of(quickstart / name / "neo") for name in ("pretrain", "midtrain", "sft"))
    fresh = PostLLM.from_pretrained(quickstart / "llm")
    widened = {id(p) for part in fresh.hw_modules() for p in part.parameters()}
    for name, parameter in fresh.named_parameters():
        same = torch.equal(parameter, first[f"post_llm.{name}"])
        assert same != (id(parameter) in widened), name
    for before, after in ((first, second), (second, third)):
        assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, third[name]) for name, tensor in weights_of(quickstart / "neo").items())


def test_the_asset_is_what_was_trained_and_what_was_attached(quickstart: Path) -> None:
    asset, model = PreBuffer.from_pretrained(quickstart / "pre_buffer"), NEO.from_pretrained(quickstart / "neo")
    state = model.pre_buffer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in asset.state_dict().items())
    assert asset.anchors is not None and asset.info.image["min_pixels"] == 128**2
    assert [stage["stage"] for stage in asset.info.provenance["stages"]][-1] == "sft"
    reused, control = (NEO.from_pretrained(quickstart / name / "neo") for name in ("attach", "attach_random"))
    sizes = [part.hparams.hidden_size for part in (reused.pre_buffer, reused.post_llm)]
    assert sizes[0] != sizes[1] and sizes[0] == asset.hparams.hidden_size
    assert dict(reused.post_llm.hparams) == dict(control.post_llm.hparams)
    weight = "layers.0.mlp.up_proj.weight"
    assert _distance(reused.pre_buffer.state_dict()[weight], state[weight]) < 0.2
    torch.manual_seed(7)  # the run's own seed gives the control the weights that pre-training began with
    recipes = [
        load_recipe(f"quickstart/{name}", [f"variables.root={quickstart}"]) for name in ("attach", "attach_random")
    ]
    near, far = (_distance(build(one.model).pre_buffer.state_dict()[weight], state[weight]) for one in recipes)
    assert near == 0 and far > 1


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Length of the difference, relative to the second."""
    return float((one - other).norm() / other.norm())


# --- the report


def test_figures(quickstart: Path, figures: dict[str, Any]) -> None:
    assert set(figures) == {
        "accuracy", "accuracy_blind", "accuracy_shuffled", "accuracy_majority", "accuracy_lookup", "reuse",
        "questions", "validation", "minutes", "device", "precision", "versions", "seed", "scale",
    }  # fmt: skip
    for name in ("accuracy", "accuracy_blind", "accuracy_shuffled"):
        assert set(figures[name]) == KINDS
        assert all(0 <= value <= 1 for value in figures[name].values())
    assert figures["accuracy_majority"] == pytest.approx(0.3733, abs=1e-4)
    assert figures["accuracy_lookup"] == pytest.approx(0.6700, abs=1e-3)
    assert set(figures["reuse"]) == {"reused", "random"}
    assert all(0 <= value <= 1 for value in figures["reuse"].values())
    assert set(figures["minutes"]) == {"total"} | STEPS
    assert figures["minutes"]["total"] == pytest.approx(sum(figures["minutes"][step] for step in STEPS), abs=0.04)
    assert {"neo_components", "python", "torch", "lightning", "transformers"} <= set(figures["versions"])
    assert (figures["seed"], figures["scale"], figures["precision"]) == (0, 0.02, "bf16-mixed")
    assert figures["device"] == describe(find_training_device())
    counts = figures["questions"]
    assert set(counts) == KINDS and counts["overall"] == 194 == sum(counts[kind] for kind in KINDS - {"overall"})
    right = sum(figures["accuracy"][kind] * counts[kind] for kind in KINDS - {"overall"})
    assert right / counts["overall"] == pytest.approx(figures["accuracy"]["overall"], abs=1e-3)
    assert [point["stage"] for point in figures["validation"]] == ["pretrain", "midtrain", "sft"]
    minutes = [point["minutes"] for point in figures["validation"]]
    assert minutes == sorted(minutes) and minutes[-1] <= figures["minutes"]["training"] + 0.02


def test_figures_are_those_of_the_saved_model(quickstart: Path, figures: dict[str, Any], tmp_path: Path) -> None:
    """The model folder, asked again, gives the answers that the report counted."""
    from neo_components.evaluation import evaluate

    chat = Chat.from_pretrained(quickstart / "neo")
    questions = list(questions_from_shards(quickstart / "shards" / "test"))[::50]
    limits = {"min_pixels": chat.min_pixels, "max_pixels": chat.max_pixels, "max_new_tokens": 8}
    report = evaluate(chat.model, chat.tokenizer, questions, progress=None, **limits)
    assert report.counts == figures["questions"]
    assert report.accuracy == pytest.approx(figures["accuracy"], abs=0.02)


def test_report_shows_the_figures_and_links_what_is_there(quickstart: Path, figures: dict[str, Any]) -> None:
    text = (quickstart / "report.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {Path(link).name for link in links} == {
        "answers.png", "accuracy.png", "loss.png", "attention.png", "mask.png"
    }  # fmt: skip
    assert all((quickstart / link).is_file() for link in links)
    assert "the scores are not meaningful" in text  # at this scale
    row = re.search(r"\| this model \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text)
    assert row is not None
    assert [float(cell) for cell in row.groups()] == pytest.approx(
        [figures["accuracy"][kind] for kind in ("overall", "shape", "color", "yes_no")], abs=6e-4
    )
    fall = 100 * (figures["accuracy"]["overall"] - figures["accuracy_shuffled"]["overall"])
    assert ("points: the model uses the image." in text) == (fall >= 25)
    assert 'neo chat out/neo --image X.png "what color is the shape?"' in text


@pytest.mark.parametrize("name", ["answers", "accuracy", "loss", "attention", "mask"])
def test_figures_show_something(quickstart: Path, name: str) -> None:
    with Image.open(quickstart / "figures" / f"{name}.png") as picture:
        picture.load()
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 400
    drawn = (pixels != pixels[0, 0]).any(-1)
    assert 0.01 < drawn.mean() < 0.99
    rows, columns = drawn.any(1).nonzero()[0], drawn.any(0).nonzero()[0]
    assert rows[-1] - rows[0] > 0.8 * len(drawn) and columns[-1] - columns[0] > 0.8 * drawn.shape[1]


# --- afterwards


def test_the_model_answers_in_one_line(quickstart: Path) -> None:
    """``neo chat`` on a test image gives the answer that the evaluation got."""
    question = next(questions_from_shards(quickstart / "shards" / "test"))
    assert isinstance(question.image, bytes)
    file = quickstart.parent / "test image.png"
    file.write_bytes(question.image)
    told = good("chat", quickstart / "neo", question.question, "--image", file, "--max-new-tokens", "8")
    assert told == Chat.from_pretrained(quickstart / "neo").ask(question.question, [file], 8) + "\n"
    assert len(told.splitlines()) == 1


def test_a_second_run_starts_clean(tmp_path: Path) -> None:
    """What an earlier run made goes, all else stays; what no run made stops it."""
    for name in (*MADE, "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with pytest.raises(FileExistsError, match="not made by an earlier quickstart"):
        _clear(tmp_path)
    assert (tmp_path / "shards" / "file").is_file()
    (tmp_path / MARK).touch()
    _clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", MARK}


def test_everything_that_a_run_makes_is_known(quickstart: Path) -> None:
    assert {path.name for path in quickstart.iterdir()} == {*MADE, MARK, "report.md", "report.json"}


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.01, float("nan")])
def test_a_scale_out_of_range_is_refused(scale: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scale must be over 0 and at most 1, got "):
        run(tmp_path / "out", scale)
    assert not (tmp_path / "out").exists()
