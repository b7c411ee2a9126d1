"""What a user gets wrong at the command line: one message on standard error, status 1, no traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import good, installed_neo, neo
from shard_builders import gigantic_png, turns

FAULTS = [
    # chat
    ("chat {w}/neo hi --image {w}/broken.png", r"{w}/broken\.png: not a readable image \(no known image format\)"),
    ("chat {w}/neo hi --image {t}/none.png", r"no such image file: {t}/none\.png"),
    ("chat {w}/neo hi --image {t}/huge.png", r"{t}/huge\.png: Image size \(3600000000 pixels\) .*"),
    ("chat {w}/neo hi --image {t}/empty.png", r"{t}/empty\.png: the file is empty \(0 bytes\)"),
    ("chat {w}/neo <image><image> --image {w}/red.png", r"2 <image> tags for 1 images; .*"),
    ("chat {t}/none hi", r"'{t}/none' is no folder; give a folder with config\.json or a hub id 'owner/name'"),
    ("chat {w}/shards hi", r"{w}/shards is no checkpoint: it has no config\.json"),
    ("chat {w}/llm hi", r"{w}/llm is no NEO checkpoint \(config\.json states 'qwen3'\); .* PostLLM\.from_pretrained"),
    ("chat {w}/neo hi --max-new-tokens 0", r"needs max_new_tokens >= 1, .* got 0, 1\.0 and 1\.0"),
    ("chat {t}/bare hi", r"no tokenizer at '{t}/bare'; give a folder that holds tokenizer\.json or a hub id \(.*\)"),
    # evaluate
    ("evaluate {w}/neo {t}/none", r"no shards \(\*\.tar\) in {t}/none \(No such file or directory\); .*"),
    ("evaluate {w}/neo {w}/shards -o {w}", r"{w} is a folder; --output is the name of a JSON file"),
    # export, attach, convert
    ("export {w}/llm -o {t}/a", r"{w}/llm is no NEO checkpoint .*"),
    ("export {w}/neo -o {t}/a --anchors 0", r"anchors must be positive, got 0; .*"),
    ("attach {w}/llm {w}/other -o {t}/a", r"{w}/llm holds no pre-Buffer but 'qwen3'"),
    ("attach {t}/asset {w}/other -o {t}/a --bridge identity",
     r"bridge 'identity' needs equal widths, got 48 and 32; .*"),
    ("attach {t}/asset {w}/other -o {t}/a --bridge x", r"bridge 'x' is unknown; registered: identity, .*"),
    ("attach {t}/asset {w}/neo -o {t}/a", r"model_type 'neo' is unknown; registered: gemma3, .*"),
    ("attach {t}/asset {w}/other -o {t}/a --device gpu", r"device must be auto, cpu, cuda, cuda:N .*, got 'gpu'"),
    # devices and types
    ("chat {w}/neo hi --device cuda:99", r"device 'cuda:99' is not there: .*; available: cpu .*"),
    ("chat {w}/neo hi --device cpu --dtype float16", r"dtype 'float16' on device 'cpu': a CPU .* give float32, .*"),
    ("evaluate {w}/neo {w}/shards --dtype int8", r"dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ("export {w}/neo -o {t}/a --to program --dtype float16", r"dtype 'float16' on device 'cpu': .*"),
    ("train {w}/run.yaml output={t}/a --device cuda:99", r"device 'cuda:99' is not there: .*"),
    ("train {w}/run.yaml trainer.devices=2 --device cpu",
     r"--device cpu and trainer\.devices=2 both choose devices; leave one out"),
    ("quickstart -o {t}/quick --device cuda:99", r"device 'cuda:99' is not there: .*"),
    ("quickstart -o {t}/quick --dtype int8", r"dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
    ("convert {w}/neo -o {t}/a --layout x", r"layout must be 'neo_components' or 'released', got 'x'"),
    # recipes
    ("recipes copy quickstart/pretrai {t}/a.yaml", r"'quickstart/pretrai' is no file, .*: quickstart/pretrain .*"),
    ("recipes copy quickstart/pretrain {w}/run.yaml", r"{w}/run\.yaml exists already; remove it or .*"),
    ("inspect {t}/none.yaml", r"'{t}/none\.yaml' is no file, and no recipe that ships has that name.*"),
    # data
    ("data llava {t}/none.json -o {t}/a", r"conversations: no such file or folder: {t}/none\.json"),
    ("data llava {t}/talk.json -o {t}/a", r"{t}/talk\.json holds no usable record \(missing_image: 1\); .*"),
    ("data llava {t}/talk.json -o {w}/shards --images {w}", r"{w}/shards is not empty; .*"),
    ("data llava {t}/talk.json -o {t}/a --images {t}/none", r"images: no such file or folder: {t}/none"),
    # train
    ("train {w}/run.yaml output={t}/a --resume last", r"no checkpoint {t}/a/checkpoints/last\.ckpt to resume from; .*"),
    ("train {w}/run.yaml output={t}/a --resume {w}/red.png",
     r"{w}/red\.png is no checkpoint of a training run, or it is damaged"),
    ("train {w}/run.yaml output={t}/a trainer.devices=0", r"trainer: .*devices=0.*; change that key of the recipe .*"),
    ("train {w}/run.yaml output={t}/a data.seq_len=4", r"no sample of {w}/shards is usable; .*"),
    ("train {w}/run.yaml output={t}/a data.seq_len=4 data.workers=1", r"no sample of {w}/shards is usable; .*"),
    ("train {w}/run.yaml output={t}/a data.train.0.shards={t}/none",
     r"no shards \(\*\.tar\) in {t}/none \(No such file or directory\); .*"),
    ("train {w}/run.yaml output={t}/a --import no_such", r"--import no_such: no such module; looked in .*"),
    ("train {w}/run.yaml output={t}/a model.post_llm.from_pretrained={t}/none", r"'{t}/none' is no folder; .*"),
    # quickstart
    ("quickstart -o {t}/quick --scale 0", r"scale must be over 0 and at most 1, got 0\.0"),
    ("quickstart -o {t}/quick --scale 1.5", r"scale must be over 0 and at most 1, got 1\.5"),
    ("quickstart -o {w}", r"{w} holds shards, llm, neo, not made by an earlier quickstart, .* or remove them"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what is nearly right."""
    root = tmp_path_factory.mktemp("bad")
    (root / "huge.png").write_bytes(gigantic_png())
    (root / "empty.png").touch()
    record = {"image": "none.png", "conversations": turns("<image>\nwhat?")}
    (root / "talk.json").write_text(json.dumps([record]))
    good("export", world / "neo", "-o", root / "asset")
    (root / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (root / "bare" / name).symlink_to(world / "neo" / name)
    return root


def filled(text: str, world: Path, bad: Path, escape: bool = False) -> str:
    """The text with the two folders in their places."""
    folders = [re.escape(str(folder)) if escape else str(folder) for folder in (world, bad)]
    return text.replace("{w}", folders[0]).replace("{t}", folders[1])


def files(folder: Path) -> list[Path]:
    """All that lies in a folder, but for the lengths of samples, which are kept as soon as they are counted."""
    return sorted(path for path in folder.rglob("*") if not path.name.startswith("lengths-"))


@pytest.mark.parametrize(("line", "message"), FAULTS, ids=[line for line, _ in FAULTS])
def test_one_message(line: str, message: str, world: Path, bad: Path) -> None:
    before = files(world)
    done = neo(*filled(line, world, bad).split())
    assert done.status == 1 and not done.out
    told = [text for text in done.err.splitlines() if not re.search(r" \(\d+ %\), ", text)]  # progress up to there
    expected = re.compile("error: " + filled(message, world, bad, escape=True))
    assert len(told) == 1 and expected.fullmatch(told[0]), done.err
    assert files(world) == before
    assert not (bad / "quick").exists()


def test_faults_of_a_recipe_come_together(world: Path) -> None:
    overrides = ["stage.steps=fast", "model.pre_bufer.depth=1", "seed=x", "model.rope=spiral", "stage.train=[bridge]"]
    for command in ("validate", "train", "inspect"):
        words = ["recipes", "validate"] if command == "validate" else [command]
        done = neo(*words, world / "run.yaml", *overrides)
        assert done.status == 1 and not done.out
        first, *faults = done.err.splitlines()
        assert first == "error: 5 faults in the recipe:"
        keys = sorted(fault.split(": ")[1] for fault in faults)
        assert keys == ["model.pre_bufer", "model.rope", "seed", "stage.steps", "stage.train.0"]
        assert all(fault.startswith("  override '") for fault in faults)


def test_a_checkpoint_of_another_model_or_of_a_finished_run(world: Path, tmp_path: Path) -> None:
    run = ["train", world / "run.yaml", f"output={tmp_path}/run"]
    good(*run)
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    other = neo(*run, "stage.steps=9", "model.pre_buffer.depth=2", "--resume", "last")
    assert (other.status, other.out) == (1, "")
    assert other.err.endswith(
        "last.ckpt is of another model: pre_buffer.depth is 2, and was 1; resume with the recipe of its run\n"
    )
    done = neo(*run, "--resume", "last")
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith("last.ckpt has 2 steps already, stage.steps is 2: raise it to go on\n")
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chat {w}/neo", "Missing argument 'question'"),
        ("chat {w}/neo hi --imag x", "No such option: --imag"),
        ("evaluate {w}/neo {w}/shards --limit 0", "should be greater than or equal to 1"),
        ("quickstart --scale much", "Invalid value for '--scale': Input should be a valid number"),
        ("trian", "No such command 'trian'"),
    ],
)
def test_usage(line: str, message: str, world: Path) -> None:
    """What is no command line gets its usage and status 2, as everywhere."""
    done = neo(*filled(line, world, world).split())
    assert done.status == 2 and not done.out
    assert "Usage: neo" in done.err and message in " ".join(done.err.split())


@pytest.mark.parametrize("what", ["broken.png", "none.json", "--resume last"])
def test_the_installed_command_does_the_same(what: str, world: Path, bad: Path, tmp_path: Path) -> None:
    [(line, message)] = [(line, message) for line, message in FAULTS if what in line]
    done = installed_neo(*filled(line, world, bad).split(), folder=tmp_path)
    assert done.status == 1 and not done.out
    assert re.fullmatch("error: " + filled(message, world, bad, escape=True) + "\n", done.err), done.err


def test_a_traceback_on_demand(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEO_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError, match="no such image file"):
        neo("chat", world / "neo", "hi", "--image", "none.png")
