"""A converter from outside the package: one file with one registration is a working command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Done, neo
from shard_builders import png, turns

from neo_components.data import Converter, convert_to_shards, read_shards
from neo_components.registry import CONVERTERS

EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "pairs.py"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the example's file and a data set: four lines of which two can be used."""
    shutil.copyfile(EXAMPLE, tmp_path / "pairs.py")
    (tmp_path / "photos").mkdir()
    for name in ("red", "blue"):
        (tmp_path / "photos" / f"{name}.png").write_bytes(png(color=(200 * (name == "red"), 0, 0)))
    (tmp_path / "photos" / "bad.png").write_bytes(b"nonsense")
    lines = ["red.png,What?,Red.", "gone.png,What?,Red.", "bad.png,What?,Red.", 'blue.png,"What, then?",Blue.']
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("pairs", None)
    if "pairs" in CONVERTERS:
        CONVERTERS.remove("pairs")


def fresh(*arguments: str, columns: int = 120) -> Done:
    """``neo`` in a process of its own, which knows nothing of the file yet."""
    code = "import sys; from neo_components.cli.main import main; sys.argv[0] = 'neo'; main()"
    path = os.pathsep.join(filter(None, [str(EXAMPLE.parents[2]), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": str(columns)},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def test_the_example_is_a_command(own: Path) -> None:
    """It converts, skips and counts what cannot be used, and writes the same in one process and in several."""
    unknown = fresh("data", "pairs", "pairs.csv", "-o", "out")
    assert unknown.status == 2 and "No such command 'pairs'" in unknown.err
    command = ["data", "pairs", "pairs.csv", "--images", "photos", "--suffix", " Be brief."]
    done = fresh(*command, "-o", "out", "--import", "pairs", "--workers", "2", "--shard-size", "2")
    assert done.status == 0, done.err
    assert done.out == "read 4, written 2, skipped (missing_image) 1, skipped (unreadable) 1: out\n"
    assert "pairs.csv, record 1 (missing_image): no image 'gone.png' in photos" in done.err
    one, two = read_shards("out")
    assert one == {
        "key": "00000000",
        "conversations": turns("<image>\nWhat? Be brief.", "Red."),
        "images": [(own / "photos" / "red.png").read_bytes()],
    }
    assert two["key"] == "00000003" and two["conversations"] == turns("<image>\nWhat, then? Be brief.", "Blue.")
    assert sorted(path.name for path in Path("out").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    before = neo("data", "--import", "pairs", *command[1:], "-o", "again", "--workers", "0", "--shard-size", "2")
    assert before.out == done.out.replace(": out", ": again")
    files = [{path.name: path.read_bytes() for path in (own / name).iterdir()} for name in ("out", "again")]
    assert files[0] == files[1]


def test_its_help_is_that_of_its_docstring(own: Path) -> None:
    shown = fresh("data", "pairs", "--import", "pairs", "--help")
    assert shown.status == 0 and "Convert questions and answers about images into shards." in shown.out
    lines = [" ".join(line.strip("│* ").split()) for line in shown.out.splitlines()]
    assert "table <path> CSV file with IMAGE,QUESTION,ANSWER in each line. [required]" in lines
    assert any(line.startswith("--suffix <str> Text behind each question") for line in lines)
    for option in ("--output", "--shard-size", "--workers", "--images", "--import"):
        assert any(line.startswith(option) for line in lines), option
    assert any(line.startswith("│ pairs ") for line in fresh("data", "--import", "pairs", "--help").out.splitlines())


def test_the_page_shows_the_example_and_its_command(own: Path) -> None:
    page = (EXAMPLE.parents[1] / "own_data.md").read_text(encoding="utf-8")
    assert '--8<-- "docs/examples/pairs.py"' in page and len(EXAMPLE.read_text().splitlines()) <= 40
    [command] = re.findall(r"```console\nneo (.*)\n```", page)
    (own / "photos").rename(own / "images")
    assert neo(*shlex.split(command)).out.startswith("read 4, written 2, skipped (missing_image) 1")
    assert [sample["conversations"][1]["value"] for sample in read_shards("shards/pairs")] == ["Red.", "Blue."]


def test_faults_of_a_converter_are_named(own: Path) -> None:
    import pairs

    for options, error, message in (
        ({"table": "none.csv"}, FileNotFoundError, "table: no such file or folder: none.csv"),
        ({"table": "pairs.csv", "sufix": "x"}, ValueError, r"no option 'sufix' \(.*; did you mean 'suffix'"),
        ({}, ValueError, "'pairs' needs the option 'table'"),
    ):
        with pytest.raises(error, match=message):
            convert_to_shards({"kind": "pairs", **options}, "out")
    with pytest.raises(ValueError, match=r"converter 'pair' is unknown; registered: .*did you mean 'pairs'"):
        convert_to_shards("pair", "out")

    class OneKey(pairs.Pairs):
        def sample(self, record: list[str]) -> dict[str, object]:
            return {"key": "same", **super().sample(record)}

    with pytest.raises(ValueError, match="the key 'same' is used twice"):
        convert_to_shards(OneKey("pairs.csv", "photos"), "out", shard_size=1)
    with pytest.raises(ValueError, match="shard_size must be at least 1, got 0"):
        convert_to_shards(pairs.Pairs("pairs.csv", "photos"), "out", shard_size=0)
    with pytest.raises(NotImplementedError, match=r"Converter must define records\(\)"):
        convert_to_shards(Converter(), "out")
    assert not Path("out").exists()


def test_an_unreadable_source_stops_and_is_resumed(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the file system is no fault of the sample: nothing is skipped, and finished shards are kept."""
    import pairs

    shutil.copyfile("photos/red.png", "photos/gone.png")
    os.chmod("photos/blue.png", 0)
    if os.access("photos/blue.png", os.R_OK):  # root reads everything: a folder in its place cannot be read either
        original = Path.read_bytes

        def refused(path: Path) -> bytes:
            if path.name == "blue.png":
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(ValueError, match=r"pairs\.csv, record 3 cannot be read \(.*Permission denied.*same conversion"):
        convert_to_shards(pairs.Pairs("pairs.csv", "photos"), "out", shard_size=1)
    finished = Path("out.part/shard-000000.tar").stat().st_mtime_ns
    os.chmod("photos/blue.png", 0o644)
    monkeypatch.undo()
    monkeypatch.chdir(own)
    assert convert_to_shards(pairs.Pairs("pairs.csv", "photos"), "out", shard_size=1).kept == 3
    assert Path("out/shard-000000.tar").stat().st_mtime_ns == finished


def test_help_of_every_converter_loads_nothing_heavy() -> None:
    code = """
import sys
from neo_components.cli.main import main
from neo_components.registry import CONVERTERS
for name in sorted(CONVERTERS):
    sys.argv = ["neo", "data", name, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code
print(*sorted({"torch", "transformers", "lightning", "webdataset", "pyarrow", "av"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("Usage: neo data ") == 6 and done.stdout.splitlines()[-1] == ""
