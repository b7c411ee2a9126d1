"""The commands and programs of the pages on reuse and on programs, run as written on a small model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import good
from shard_builders import png

from neo_components import NEO, PreBuffer

ROOT = Path(__file__).parent.parent
SHORT = [
    "stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=0", "stage.checkpoint_every=2", "data.workers=0",
    "data.seq_len=512",
]  # fmt: skip
WITHOUT_US = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("neo_components", "lightning", "omegaconf", "torchmetrics", "webdataset"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    return [shlex.split(line, comments=True) for line in lines]


@pytest.fixture(scope="module")
def folder(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small output folder of the quickstart; images of the size that the pages use have 256 visual tokens here."""
    folder = tmp_path_factory.mktemp("pages")
    made = folder / "outputs" / "quickstart"
    (made / "shards").mkdir(parents=True)
    for name, source in {"neo": "neo", "llm": "llm", "llm_b": "other"}.items():
        (made / name).symlink_to(world / source)
    for name in ("train_all", "validation"):
        (made / "shards" / name).symlink_to(world / "shards")
    (folder / "X.png").write_bytes(png(64, 64))
    good("export", made / "neo", "-o", made / "pre_buffer")
    return folder


def test_the_commands_of_the_reuse_page_run_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    lines = commands("reuse.md")
    assert [words[1] for words in lines] == ["export", "attach", "chat", "train", "train", "chat", "train", "train"]
    for words in lines:
        assert words[0] == "neo"
        good(*words[1:], *(SHORT if words[1] == "train" else ()))
    assert PreBuffer.from_pretrained("outputs/quickstart/pre_buffer").info.license == "apache-2.0"
    assert NEO.from_pretrained("outputs/quickstart/reuse_bridges/neo").text == "bypass"
    assert NEO.from_pretrained("outputs/quickstart/reuse_stage2/neo").bridge_in is not None
    [example] = blocks("reuse.md", "python")
    names: dict[str, NEO] = {}
    exec(compile(example, "docs/reuse.md", "exec"), names)
    assert names["model"].text == "bypass"


def test_the_programs_page_runs_without_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    export, export_llm, example = commands("programs.md")
    assert good(*export_llm[1:]) == "outputs/neo-llm\n"
    assert good(*export[1:]) == "outputs/program\n" and example[:2] == ["python", "docs/examples/probe.py"]
    printed = []
    for program in blocks("programs.md", "python")[:2]:
        code = WITHOUT_US + program.replace("COUNT = 1000", "COUNT = 40")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0].endswith("\n")
    assert [line.split(":")[0] for line in printed[1].splitlines()] == ["shape", "color"]
    assert printed[1].count("of 40 test images") == 2


def test_the_probe_example_trains_a_head(folder: Path) -> None:
    """A head that is trained alone classifies eight out of ten images after four epochs."""
    script = ROOT / "docs" / "examples" / "probe.py"
    assert len(script.read_text().splitlines()) < 80
    command = [sys.executable, script, folder / "outputs" / "quickstart" / "pre_buffer", "--epochs", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [accuracy] = re.findall(r"^accuracy ([\d.]+), by chance 0.250$", done.stdout, re.MULTILINE)
    assert float(accuracy) > 0.8
