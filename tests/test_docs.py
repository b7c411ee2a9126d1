"""What README, CONTRIBUTING and the pages tell a user to type works, and what they name exists."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from commands import good, installed_neo
from shard_builders import png, turns
from test_sharding import torchrun
from torch.distributed.run import get_args_parser

import neo_components
from neo_components.cli.main import app
from neo_components.data import read_shards, write_shards
from neo_components.model.neo import NEO
from neo_components.recipe import list_recipes
from neo_components.recipe.schema import keys
from neo_components.recipe.stage import Group
from neo_components.registry import LLM_FAMILIES, METRICS
from neo_components.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
NEO_COMMAND: Any = typer.main.get_command(app)


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def inline(page: str) -> list[str]:
    """The code inside the sentences of a page."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]


def bash_lines(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def everywhere(pattern: str, also_inline: bool = True) -> list[tuple[str, str]]:
    """(page, code) of all commands that match."""
    found = [(page, line) for page in PAGES for line in [*bash_lines(page), *(inline(page) if also_inline else ())]]
    return sorted({(page, line) for page, line in found if re.match(pattern, line)})


COMMANDS = everywhere(r"neo \w")


# --- what is typed


def test_there_are_commands_on_the_pages_that_tell_of_them() -> None:
    pages = {page for page, _ in COMMANDS}
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "docs/quickstart.md",
        "docs/recipes.md",
        "docs/data.md",
        "docs/training.md",
    } <= pages


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[" ".join(place) for place in COMMANDS])
def test_commands_parse(page: str, line: str) -> None:
    """Sub-command, options and required arguments, as the command line itself reads them; recipes exist."""
    words = shlex.split(line, comments=True)[1:]
    command, context = NEO_COMMAND, None
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if "--import" in words and command.name == "data":  # a user's own converter, run by test_extend.py
            return
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command = command.commands[words.pop(0)]
    if not words or words == ["--help"]:
        assert words or line in inline(page) or command.name in ("recipes", "quickstart", "list")
        return
    context = command.make_context(command.name, list(words))
    name = context.params.get("name") or context.params.get("recipe")
    if name and "/" in name:
        assert name in {recipe.name for recipe in list_recipes()}


def test_options_exist() -> None:
    """Also those that are named without their command."""

    def options(command: Any) -> set[str]:
        own = {option for parameter in command.params for option in parameter.opts}
        return own.union(*(options(inner) for inner in getattr(command, "commands", {}).values()))

    others = {"--fix", "--local-dir", "--logdir", "--force-reinstall", "--no-deps"}  # of ruff, hf, tensorboard and pip
    known = options(NEO_COMMAND) | {"--help"} | others
    known |= {option for action in get_args_parser()._actions for option in action.option_strings}  # torchrun's
    for page in PAGES:
        named = {
            word for code in [*inline(page), *bash_lines(page)] for word in re.findall(r"(?<!\S)--[a-z][\w-]*", code)
        }
        assert named <= known, page


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {(page, line.split()[1]) for page, line in everywhere("make ")}
    assert {("README.md", "quickstart"), ("README.md", "test"), ("docs/quickstart.md", "quickstart")} <= named
    assert {target for _, target in named} <= targets


# --- what is run


@pytest.fixture
def clone(quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as it is after the quickstart, with few test questions; the working folder of the test."""
    made = tmp_path / "outputs" / "quickstart"
    (made / "shards").mkdir(parents=True)
    for source in (quickstart / "neo", quickstart / "llm", *(quickstart / "shards").iterdir()):
        if source.name != "test":
            (made / source.relative_to(quickstart)).symlink_to(source)
    some = [sample for sample, _ in zip(read_shards(quickstart / "shards" / "test"), range(12), strict=False)]
    write_shards(some, made / "shards" / "test")
    (tmp_path / "X.png").write_bytes(png(64, 64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_the_trained_model_is_asked_as_written(page: str, clone: Path) -> None:
    [line] = [line for line in bash_lines(page) if line.startswith("neo ")]
    answer = good(*shlex.split(line)[1:])
    assert answer.endswith("\n") and len(answer.splitlines()) == 1


def test_the_commands_of_the_recipe_page_in_their_order(clone: Path) -> None:
    """The training is that of the page, cut short by further overrides."""
    lines = [shlex.split(line, comments=True)[1:] for line in bash_lines("docs/recipes.md")]
    assert [words[0] for words in lines] == ["recipes", "recipes", "recipes", "inspect", "train"]
    listed, copied, valid, costs = (good(*words) for words in lines[:4])
    assert all(recipe.name in listed for recipe in list_recipes())
    assert (copied, valid) == ("my_run.yaml\n", "valid\n") and "pre_buffer" in costs
    short = ["stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "data.seq_len=512", "data.workers=0"]
    assert "model: outputs/quickstart/pretrain/neo" in good(*lines[4], *short)
    assert NEO.from_pretrained("outputs/quickstart/pretrain/neo").pre_buffer.hparams.depth >= 1
    [example] = blocks("docs/recipes.md", "python")
    names: dict[str, Any] = {}
    exec(compile(example, "docs/recipes.md", "exec"), names)
    assert len(names["model"].pre_buffer.layers) == 4


def test_the_commands_of_the_data_page_in_their_order(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, recipe and commands of the page: converted, inspected, trained on, resumed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").symlink_to(world / "llm")
    (tmp_path / "images").mkdir()
    for name, color in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        (tmp_path / "images" / f"{name}.png").write_bytes(png(64, 96, color))
    (tmp_path / "captions.csv").write_text("file_name,caption\nred.png,A red square.\nblue.png,A blue square.\n")
    records = [{"image": f"{n}.png", "conversations": turns("<image>What is it?")} for n in ("red", "blue", "gone")]
    (tmp_path / "conversations.json").write_text(json.dumps(records))
    (tmp_path / "texts.jsonl").write_text('{"text": "Red is a color."}\n')
    [recipe] = blocks("docs/own_data.md", "yaml")
    (tmp_path / "my_run.yaml").write_text(recipe)
    outputs = [good(*shlex.split(line)[1:]) for line in bash_lines("docs/own_data.md")]
    assert outputs[1] == "read 3, written 2, skipped (missing_image) 1: shards/conversations\n"
    assert "read 3, written 2, skipped (missing_image) 1: shards/conversations" in inline("docs/own_data.md")
    assert (tmp_path / "inspection" / "samples.png").is_file()
    assert outputs[4].startswith("usable 2 of 2, ")
    assert all("model: outputs/mine/neo" in output for output in outputs[5:])
    assert len(outputs) == 7


def test_the_commands_of_the_training_page_in_their_order(clone: Path) -> None:
    """All stages one after the other, what is done with the result, adapters, the accumulated run and the resumed one;
    the training is cut short by further overrides."""
    short = ["stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "stage.checkpoint_every=1"]
    short += ["stage.predictions=0", "data.seq_len=512", "data.workers=0", "stage.whiten_patches=0"]
    lines = [shlex.split(line, comments=True)[1:] for line in bash_lines("docs/training.md")]
    names = ["pretrain", "midtrain", "sft", None, None, None, "sft", "pretrain", "pretrain"]
    assert [words[1].removeprefix("quickstart/") for words in lines if words[0] == "train"] == [n for n in names if n]
    assert [words[0] for words in lines if words[0] != "train"] == ["chat", "evaluate", "convert"]
    for words, name in zip(lines, names, strict=True):
        if name is None:
            assert good(*words).strip()
            continue
        resumed, adapted = "--resume" in words, any("lora" in word for word in words)
        told = good(*words, *(["stage.steps=3", *short[1:]] if resumed else short))
        left = Path("outputs/quickstart") / (f"{name}_lora" if adapted else name)
        assert f"model: {left}/neo" in told
        assert torch.load(left / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2 + resumed
        assert NEO.from_pretrained(left / "neo").post_llm.hparams.depth >= 1
    assert NEO.from_pretrained("outputs/quickstart/released").input_spec.factor == 32


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_of_the_scaling_page_in_their_order(clone: Path) -> None:
    """Both strategies and context parallelism, started by the command itself, then torchrun's line twice: the second
    time it goes on."""
    short = ["stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "stage.checkpoint_every=1"]
    short += ["stage.predictions=0", "data.seq_len=512", "data.workers=0", "stage.whiten_patches=0"]
    lines = [shlex.split(line, comments=True) for line in bash_lines("docs/scaling.md")]
    assert [words[0] for words in lines] == ["neo", "neo", "torchrun", "neo"]
    run = Path("outputs/quickstart/pretrain")
    for words in (*lines[:2], lines[3]):
        done = installed_neo(*words[1:], *short, folder=clone)
        assert done.status == 0 and done.out.count(f"model: {run}/neo") == 1, done.err
        assert NEO.from_pretrained(run / "neo").post_llm.hparams.depth >= 1
    assert lines[2][:2] == ["torchrun", "--standalone"] and lines[2][6:9] == ["$(which", "neo)", "train"]
    run = Path("outputs/quickstart/midtrain")
    for steps in (3, 4):
        words = [Path(sys.executable).with_name("neo"), *lines[2][8:], f"stage.steps={steps}", *short[1:]]
        started = torchrun(2, *lines[2][4:6], *words, folder=clone)
        assert started.returncode == 0, started.stderr[-4000:]
        assert read_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == steps
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "last.ckpt",
        "step-000003.ckpt",
        "step-000004.ckpt",
    }


def test_python_of_the_readme() -> None:
    [example] = blocks("README.md", "python")
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    model, [answer] = names["model"], names["answer"]
    assert answer.shape == (8,) and answer.dtype == torch.int64
    untouched = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not untouched


def test_python_of_the_generation_page() -> None:
    names: dict[str, Any] = {}
    for example in blocks("docs/generation.md", "python"):
        exec(compile(example, "docs/generation.md", "exec"), names)
    assert [len(tokens) <= 8 and tokens.dtype == torch.int64 for tokens in names["greedy"]] == [True, True]
    assert [tokens.shape for tokens in names["drawn"]] == [(8,), (8,)]


def test_python_of_the_language_model_page(clone: Path) -> None:
    names: dict[str, Any] = {}
    for example in blocks("docs/language_models.md", "python"):
        exec(compile(example, "docs/language_models.md", "exec"), names)
    assert names["logits"].shape == (1, 3, names["llm"].hparams.vocab_size)
    assert names["model"].post_llm is names["llm"]


def test_the_table_of_families_is_whole() -> None:
    told = re.findall(r"^\| `(\w+)` \| ", PAGES["docs/reference/weights.md"], re.MULTILINE)
    assert sorted(told) == sorted(LLM_FAMILIES)


def test_python_of_the_evaluation_page(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for example in blocks("docs/evaluation.md", "python"):
        exec(compile(example, "docs/evaluation.md", "exec"), names)
    assert names["report"].counts["overall"] == 12 == len(names["questions"])
    assert names["shuffled"].counts == names["blind"].counts == names["report"].counts
    [promised] = re.findall(r"print\(metric.compute\(\)\)  # (.*)", PAGES["docs/evaluation.md"])
    assert capsys.readouterr().out.splitlines()[-1] == promised
    METRICS.remove("contains")


def test_the_commands_of_the_evaluation_page(clone: Path) -> None:
    """The second one with the metric of the page, as a module in the working folder."""
    page = "docs/evaluation.md"
    [metric] = [example for example in blocks(page, "python") if "METRICS.register" in example]
    Path("my_metric.py").write_text(metric)
    scored, own = (installed_neo(*shlex.split(line)[1:], folder=clone) for line in bash_lines(page))
    assert scored.status == own.status == 0, scored.err + own.err
    report = json.loads(Path("scores.json").read_text())
    assert scored.out.split()[:2] == ["overall", f"{report['accuracy']['overall']:.4f}"]
    assert float(own.out.split()[1]) >= float(scored.out.split()[1])  # whoever is equal also contains


def test_the_page_on_transformers_in_its_order(clone: Path) -> None:
    """The commands, then its programs as they stand, each in a process of its own."""
    page = "docs/transformers.md"
    commands = [shlex.split(line)[1:] for line in bash_lines(page)]
    assert [words[3] for words in commands] == ["hf", "hf-llm"]
    for words, folder in zip(commands, ("outputs/neo-hf", "outputs/neo-llm"), strict=True):
        assert good(*words) == f"{folder}\n"
    environment = os.environ | {"HF_MODULES_CACHE": str(clone / "modules")}
    printed = []
    for example in blocks(page, "python"):
        done = subprocess.run(
            [sys.executable, "-c", example], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    answers, text = printed
    first = good(
        "chat", "outputs/quickstart/neo", "--image", "X.png", "what color is the shape?", "--max-new-tokens", "64"
    )
    assert answers.splitlines()[0].strip() == first.strip() and len(answers.splitlines()) >= 3
    assert text.startswith("what color")
    [listed] = [part for part in PAGES[page].split("\n\n") if part.startswith("| file |")]
    named = {name for line in listed.splitlines()[2:] for name in re.findall("`([^`]+)`", line.split("|")[1])}
    there = {path.name for path in (clone / "outputs" / "neo-hf").iterdir()} - {"README.md"}
    assert {re.sub(r"^neo_.*", "neo_*.py", name) for name in there} == named


def test_python_of_the_reference() -> None:
    [example] = blocks("docs/reference/index.md", "python")
    exec(compile(example, "docs/reference/index.md", "exec"), {})


# --- what is named


def test_recipe_keys_exist() -> None:
    groups = {name for name in Group.__args__ if "." in name}  # type: ignore[attr-defined]
    wanted = re.compile(r"((?:model|stage|data|trainer)(?:\.[\w]+|\[\])+)(?:=.*)?")
    found = 0
    for page in PAGES:
        for code in [*inline(page), *(word for _, line in COMMANDS for word in line.split())]:
            if (key := wanted.fullmatch(code)) and key[1] not in groups and not code.endswith(".safetensors"):
                found += 1
                general = re.sub(r"\.\d+(?=\.|$)", "[]", key[1])
                assert general in keys() or _owned(general), f"{page}: {code}"
    assert found > 50


def _owned(key: str) -> bool:
    """Keys that the page names as not allowed."""
    from neo_components.recipe.schema import TRAINER_OWNED

    return key.removeprefix("trainer.") in TRAINER_OWNED


def test_files_exist() -> None:
    """Paths in code; words in capitals stand for a user's own."""
    package = ROOT / "neo_components"
    places = [ROOT, package, *(package / name for name in ("components", "llms", "export/hf"))]
    found = 0
    for page in PAGES:
        for code in inline(page):
            if re.fullmatch(r"[\w./-]+\.(py|toml)|[\w.-]+(/[\w.-]+)+\.(py|yaml|md)", code) and not re.search(
                "[A-Z]{4}", code
            ):
                found += 1
                shown = (f"# {code}\n", f"Save this as `{code}`")  # a file that a page shows
                own = any(text in other for text in shown for other in PAGES.values())
                assert own or any((place / code).is_file() for place in places), f"{page}: {code}"
    assert found > 10


def test_classes_have_what_is_named() -> None:
    """``Class.member`` in code."""
    classes: dict[str, Any] = {}
    for module in pkgutil.walk_packages(neo_components.__path__, "neo_components."):
        loaded = importlib.import_module(module.name)
        classes |= {name: value for name, value in vars(loaded).items() if inspect.isclass(value)}
    found = 0
    for page in PAGES:
        for code in inline(page):
            named = re.match(r"([A-Z]\w+)\.([a-z_]\w+)", code)
            if named and (named[1] in classes or not named[1].isupper()):  # KEY, NAME: a user's own
                found += 1
                assert named[1] in classes, f"{page}: {code}"
                assert hasattr(classes[named[1]], named[2]) or named[2] in classes[named[1]].__annotations__, code
    assert found
