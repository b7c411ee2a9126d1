"""Each command of ``neo`` does what it says."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from builders import same_outputs, same_tensors, weights_of
from commands import good, installed_neo, neo
from shard_builders import turns

from neo_components import NEO, PreBuffer, load_recipe
from neo_components.cli.main import app
from neo_components.data import read_shards
from neo_components.model.chat import Chat
from neo_components.recipe import list_recipes


def commands(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """All commands with their words, groups included."""
    found = [(path, group)]
    for name, command in subcommands(group).items():
        found += commands(command, (*path, name))
    return found


def subcommands(group: Any) -> dict[str, Any]:
    """Commands of a group by name, also those that it makes when asked."""
    if not hasattr(group, "list_commands"):
        return {}
    context = typer.Context(group)
    return {name: group.get_command(context, name) for name in group.list_commands(context)}


COMMANDS = commands(typer.main.get_command(app))


# --- help


def test_the_commands_are_those_promised() -> None:
    promised = {"quickstart", "train", "evaluate", "chat", "export", "attach", "convert", "data", "inspect", "recipes"}
    promised |= {"pretrained"}
    assert {path[0] for path, _ in COMMANDS if path} == promised
    assert {" ".join(path) for path, _ in COMMANDS if len(path) > 1} == {
        "data llava", "data captions", "data vlmeval", "data webdataset", "data text", "data index", "data inspect",
        "data synth", "data pretrain-mix", "recipes copy", "recipes validate", "pretrained list", "pretrained add",
        "pretrained make",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) or "neo" for path, _ in COMMANDS])
def test_help_tells_all(path: tuple[str, ...], command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)
    text = " ".join(good(*path, "--help").split())
    assert " ".join(("Usage: neo", *path)) in text
    assert command.help and " ".join(command.help.split()) in text
    for parameter in command.params:
        if "--help" in parameter.opts:
            continue
        assert parameter.help and parameter.help in text
        for name in parameter.opts:
            assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name
        if isinstance(parameter.default, int | float) and parameter.default is not False:
            assert f"[default: {parameter.default}]" in text
    for name, inner in subcommands(command).items():
        first = " ".join(inner.help.split("\n\n")[0].split())
        assert re.search(rf"│ {name} +{re.escape(first)}", text), name


def test_help_is_quick(tmp_path: Path) -> None:
    """What takes long to import is imported by the commands that need it."""
    import subprocess

    heavy = {"torch", "lightning", "transformers", "omegaconf", "matplotlib", "webdataset"}
    code = f"import sys, neo_components.cli.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = installed_neo("--help", folder=tmp_path)
    assert shown.status == 0 and "quickstart" in shown.out and not shown.err


# --- chat and evaluate


def test_chat_answers(world: Path) -> None:
    chat = Chat.from_pretrained(world / "neo")
    picture = world / "red.png"
    blind, seen = chat.ask("what is it?", [], 6), chat.ask("what is it?", [picture], 6)
    assert good("chat", world / "neo", "what is it?", "--max-new-tokens", "6") == f"{blind}\n"
    assert good("chat", world / "neo", "what is it?", "--max-new-tokens", "6", "--image", picture) == f"{seen}\n"
    assert seen != blind
    tagged = "<image> or <image>?"
    both = good("chat", world / "neo", tagged, "--image", picture, "--image", picture, "--max-new-tokens", "6")
    assert both == f"{chat.ask(tagged, [picture, picture], 6)}\n"


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_is_refused(world: Path, question: str) -> None:
    done = neo("chat", world / "neo", question, "--image", world / "red.png")
    assert done.status == 1 and not done.out
    assert done.err.startswith("error: the question is empty")


def test_evaluate_writes_scores_and_answers(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "scores.json"
    out = good("evaluate", world / "neo", world / "shards", "--max-new-tokens", "3", "--limit", "5", "-o", file)
    report = json.loads(file.read_text())
    assert set(report) == {"accuracy", "counts", "predictions", "metric"} and report["metric"] == "exact_match"
    assert report["counts"] == {"overall": 5, "color": 5}
    assert [answer["key"] for answer in report["predictions"]] == ["s0", "s1", "s2", "s3", "s4"]
    right = sum(answer["right"] for answer in report["predictions"])
    assert report["accuracy"] == {"overall": right / 5, "color": right / 5}
    expected = Chat.from_pretrained(world / "neo").ask("<image>What is it?", [next(_images(world))], 3)
    assert report["predictions"][0]["prediction"] == expected
    assert out.split() == ["overall", f"{right / 5:.4f}", "of", "5", "color", f"{right / 5:.4f}", "of", "5"]


def _images(world: Path) -> Any:
    return (sample["images"][0] for sample in read_shards(world / "shards"))


# --- export, attach, convert


def test_export_and_attach(world: Path, tmp_path: Path) -> None:
    asset, joined = tmp_path / "asset", tmp_path / "joined"
    assert good("export", world / "neo", "-o", asset, "--anchors", "200", "--license", "mit") == f"{asset}\n"
    part = PreBuffer.from_pretrained(asset)
    assert part.anchors is not None and len(part.anchors.tokens) == 200
    assert (part.info.license, part.info.image["max_pixels"]) == ("mit", 1024)
    assert good("attach", asset, world / "other", "-o", joined) == f"{joined}\n"
    chat = Chat.from_pretrained(joined)
    assert chat.model.bridge_out is not None and chat.model.text == "bypass" and chat.max_pixels == 1024
    assert same_tensors(chat.model.pre_buffer.state_dict(), part.state_dict())
    assert good("chat", joined, "hi", "--max-new-tokens", "2", "--image", world / "red.png")
    good("attach", asset, world / "llm", "-o", tmp_path / "same", "--bridge", "identity")
    assert same_outputs(NEO.from_pretrained(tmp_path / "same"), NEO.from_pretrained(world / "neo"))


def test_convert_to_the_released_layout_and_back(world: Path, tmp_path: Path) -> None:
    released, back = tmp_path / "released", tmp_path / "back"
    assert good("convert", world / "neo", "-o", released, "--layout", "released") == f"{released}\n"
    assert json.loads((released / "config.json").read_text())["model_type"] == "neo_chat"
    good("convert", released, "-o", back)
    assert same_tensors(weights_of(back), weights_of(world / "neo"))
    kept = {p.name for p in (world / "neo").iterdir()} - {"README.md"}
    assert {p.name for p in back.iterdir()} - {"README.md"} == kept
    asked = ["what is it?", "--image", world / "red.png", "--max-new-tokens", "5"]
    answers = {good("chat", folder, *asked) for folder in (world / "neo", released, back)}
    assert len(answers) == 1


# --- recipes and data


def test_inspect_shows_the_whole_recipe_and_the_groups(world: Path, tmp_path: Path) -> None:
    out = good("inspect", world / "run.yaml", "stage.steps=7", "model.pre_buffer.depth=2", "--settings")
    text, _, table = out.partition("\n\n")
    (tmp_path / "complete.yaml").write_text(text)
    assert load_recipe(tmp_path / "complete.yaml") == load_recipe(
        world / "run.yaml", ["stage.steps=7", "model.pre_buffer.depth=2"]
    )
    lines = table.partition("parameters  ")[2].partition("\n\n")[0].splitlines()[1:]
    counts = {line.split("  ")[0]: int(line[28:].split()[0].replace(",", "")) for line in lines}
    trained = {line.split("  ")[0]: int(line[28:].split()[1].replace(",", "")) for line in lines}
    model = NEO.from_pretrained(world / "neo")
    assert counts["post_llm"] == sum(p.numel() for p in model.post_llm.parameters())
    assert counts["patch_embedding"] == sum(p.numel() for p in model.patch_embedding.parameters())
    assert counts["pre_buffer"] == 2 * sum(p.numel() for p in model.pre_buffer.layers.parameters()) + 64
    assert trained["full model"] == counts["patch_embedding"] + counts["pre_buffer"]
    assert counts["full model"] == trained["full model"] + counts["post_llm"]


def test_llava_becomes_shards(world: Path, tmp_path: Path) -> None:
    records = [{"image": name, "conversations": turns("<image>\nwhat?")} for name in ("red.png", "gone.png")]
    (tmp_path / "talk.json").write_text(json.dumps([*records, {"conversations": turns("hi", "hello")}]))
    out = good("data", "llava", tmp_path / "talk.json", "-o", tmp_path / "shards", "--images", world)
    assert out == f"read 3, written 2, skipped (missing_image) 1: {tmp_path}/shards\n"
    samples = list(read_shards(tmp_path / "shards"))
    assert [len(sample["images"]) for sample in samples] == [1, 0]
    assert samples[0]["images"] == [(world / "red.png").read_bytes()]
    assert samples[1]["conversations"] == turns("hi", "hello")


def test_recipes_are_listed_copied_and_validated(tmp_path: Path) -> None:
    lines = good("recipes").splitlines()
    assert [line.split()[0] for line in lines] == [recipe.name for recipe in list_recipes()]
    assert all(len(line.split()) > 3 for line in lines)
    for recipe in list_recipes():
        copied = Path(good("recipes", "copy", recipe.name, tmp_path / recipe.name).strip())
        assert copied == tmp_path / recipe.name / recipe.path.name
        assert copied.read_text() == recipe.path.read_text()
        assert good("recipes", "validate", copied) == "valid\n"
        assert good("recipes", "validate", recipe.name, "stage.steps=3000", "seed=4") == "valid\n"


# --- train


def test_train_with_overrides_and_resume(world: Path, tmp_path: Path) -> None:
    where = f"output={tmp_path}/run"
    out = good("train", world / "run.yaml", where, "stage.steps=3", "stage.lr=0.01", "stage.log_every=1")
    assert re.search(r"training loss: [\d.]+ at step 1, [\d.]+ at step 3\n", out)
    assert f" model: {tmp_path}/run/neo " in out
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (recipe.stage.steps, recipe.stage.lr) == (3, 0.01)
    before = weights_of(tmp_path / "run" / "neo")
    frozen = weights_of(world / "neo")
    assert torch.equal(before["post_llm.word_embedding.weight"], frozen["post_llm.word_embedding.weight"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    refused = neo("train", world / "run.yaml", where, "stage.steps=5", "stage.lr=0.02", "--resume", "last")
    assert refused.status == 1
    assert "stage.lr is 0.02, and was 0.01: a resumed run goes on with the optimizer of" in refused.err
    good("train", world / "run.yaml", where, "stage.steps=5", "stage.lr=0.01", "--resume", "last")
    assert torch.load(last, weights_only=True)["global_step"] == 5
    name = "pre_buffer.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], weights_of(tmp_path / "run" / "neo")[name])


def test_a_second_run_leaves_no_checkpoint_of_the_first_as_the_last(world: Path, tmp_path: Path) -> None:
    for rate in ("0.01", "0.5"):
        good("train", world / "run.yaml", f"output={tmp_path}/run", f"stage.lr={rate}")
    files = tmp_path / "run" / "checkpoints"
    assert {p.name for p in files.iterdir()} == {"last.ckpt", "step-000001.ckpt", "step-000002.ckpt"}
    saved = torch.load(files / "last.ckpt", weights_only=True)["state_dict"]
    trained = weights_of(tmp_path / "run" / "neo")
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in trained.items())


PARTS = '''
"""A user's own parts."""
from neo_components.components.ropes.native import Native
from neo_components.registry import MASKS, ROPES


@ROPES.register("mine")
class Mine(Native):
    pass


@MASKS.register("everyone")
def everyone(query, key):
    return query.document == key.document
'''


def test_parts_of_ones_own_are_chosen_by_name(world: Path, tmp_path: Path) -> None:
    """In a process of its own, as what is registered stays; the module lies in the folder where the command runs."""
    (tmp_path / "my_parts.py").write_text(PARTS)
    chosen = ["model.rope=mine", "model.attention=everyone", f"output={tmp_path}/run", "stage.steps=1"]
    done = installed_neo("train", world / "run.yaml", *chosen, "--import", "my_parts", folder=tmp_path)
    assert done.status == 0, done.err
    config = json.loads((tmp_path / "run" / "neo" / "config.json").read_text())
    for part in ("pre_buffer", "post_llm"):
        assert (config[part]["rope"], config[part]["attention"]) == ("mine", "everyone")
    asked = ["chat", tmp_path / "run" / "neo", "hi", "--max-new-tokens", "2"]
    answered = installed_neo(*asked, "--import", "my_parts", folder=tmp_path)
    assert answered.status == 0 and answered.out.strip(), answered.err
    refused = installed_neo(*asked, folder=tmp_path)
    assert refused.status == 1 and not refused.out
    assert re.fullmatch(r"error: .* is unknown; registered: .*; if it is your own, .* --import MODULE\)\n", refused.err)
