"""The Python examples of the data pages run and print what their comments promise."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from shard_builders import SPEC, TOKENIZER, png, turns

from neo_components.data.skip_counts import REASONS

PAGE = Path(__file__).parents[1] / "docs" / "data.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    records = [{"image": "a.png", "conversations": turns("<image>")}, {"image": "b.png", "conversations": turns()}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), {"TOKENIZER": TOKENIZER, "spec": SPEC})
    promised = re.findall(r"print\(.*\)  # (.*)", examples[0])
    assert capsys.readouterr().out.splitlines() == [*promised, "2 1 {'missing_image': 1}"]


def test_python_of_the_page_on_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text('{"text": "Red is a color."}\n{"text": ""}\n')
    page = PAGE.with_name("own_data.md").read_text(encoding="utf-8")
    [example] = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "--8<--" not in one]
    exec(compile(example, "own_data.md", "exec"), {})
    assert capsys.readouterr().out == "2 1 {'no_answer': 1}\n"


def test_every_reason_is_explained() -> None:
    table = PAGE.read_text(encoding="utf-8").split("| reason |")[1].split("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(REASONS)
