"""The built wheel works alone: in another environment, from any folder, with its recipes and assets inside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from builders import weights_of

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, folder: Path) -> str:
    """Standard output of a command that succeeds; nothing of this checkout is on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LARGEST = 100 * 10**6
"""Bytes of a file that PyPI takes."""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the wheel and the source archive, built with the installed hatchling: no download."""
    folder = tmp_path_factory.mktemp("dist")
    options = ("--wheel", "--sdist", "--no-isolation", "--outdir", folder)
    run(sys.executable, "-m", "build", *options, ROOT, folder=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [file] = dist.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bin`` of an environment that holds the wheel and sees the installed dependencies, but not this checkout.

    A folder named in a .pth file is searched, but its own .pth files, where an editable install lies, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    library = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    Path(library, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps"]
    run(*pip, "--ignore-installed", wheel, folder=folder)
    return python.parent


def test_wheel_holds_code_recipes_and_assets_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {file.filename: file.file_size for file in archive.infolist()}
    code = {file.relative_to(ROOT).as_posix() for file in (ROOT / "neo_components").rglob("*.py")}
    recipes = {f"neo_components/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes
    assert code | recipes <= set(files)
    assert {name: size for name, size in files.items() if name.startswith("neo_components/assets/")} == {
        f"neo_components/{name}": size for name, size in _assets().items()
    }
    assert {file.split("/")[0] for file in files} == {"neo_components", f"neo_components-{_version(wheel)}.dist-info"}
    assert wheel.stat().st_size < LARGEST


def test_the_source_archive_holds_the_assets(dist: Path) -> None:
    """So a wheel that is built from it holds them too."""
    [file] = dist.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        files = {member.name.partition("/")[2]: member.size for member in archive if member.isfile()}
    assert {name: size for name, size in files.items() if name.startswith("assets/")} == _assets()
    assert {"pyproject.toml", "README.md", "LICENSE", "recipes/quickstart/pretrain.yaml"} <= set(files)
    assert file.stat().st_size < LARGEST


def _assets() -> dict[str, int]:
    """Size of each file of the assets that ship."""
    found = {f.relative_to(ROOT).as_posix(): f.stat().st_size for f in (ROOT / "assets").rglob("*") if f.is_file()}
    assert "assets/index.json" in found
    return found


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_code_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import neo_components; print(neo_components.__file__)", folder=tmp_path)
    assert installed.parent in Path(where.strip()).parents


def test_recipes_are_found(installed: Path, tmp_path: Path) -> None:
    """From an unrelated folder, ``neo recipes`` lists every shipped recipe, and one is copied and read."""
    names = [
        file.relative_to(ROOT / "recipes").with_suffix("").as_posix() for file in (ROOT / "recipes").rglob("*.yaml")
    ]
    listed = run(installed / "neo", "recipes", folder=tmp_path)
    assert sorted(line.split()[0] for line in listed.splitlines()) == sorted(names)
    run(installed / "neo", "recipes", "copy", min(names), "mine.yaml", folder=tmp_path)
    run(installed / "neo", "recipes", "validate", "mine.yaml", folder=tmp_path)


def test_assets_are_found(installed: Path, tmp_path: Path) -> None:
    """From an unrelated folder, ``neo pretrained list`` lists every asset that ships, and its name opens each."""
    names = [f"pretrained:{name}" for name in json.loads((ROOT / "assets" / "index.json").read_text())]
    listed = run(installed / "neo", "pretrained", "list", folder=tmp_path)
    assert [line.split()[0] for line in listed.splitlines()] == names
    code = f"from neo_components import PreBuffer; print(*(PreBuffer.from_pretrained(name).source for name in {names}))"
    assert run(installed / "python", "-c", code, folder=tmp_path).split() == names


def test_a_damaged_asset_of_the_package(installed: Path, tmp_path: Path) -> None:
    """The way out is that of an installed package."""
    where = run(installed / "python", "-c", "import neo_components; print(neo_components.__path__[0])", folder=tmp_path)
    index = Path(where.strip()) / "assets" / "index.json"
    whole = index.read_text()
    index.write_text("{")
    try:
        with pytest.raises(
            AssertionError, match=r"index\.json is damaged .* install it again: pip install --force-rein"
        ):
            run(installed / "neo", "pretrained", "list", folder=tmp_path)
    finally:
        index.write_text(whole)


def test_a_shipped_recipe_trains(installed: Path, world: Path, tmp_path: Path) -> None:
    """A copied recipe with its paths and sizes overridden, from an unrelated folder; then the trained model answers."""
    run(installed / "neo", "recipes", "copy", "quickstart/pretrain", "mine.yaml", folder=tmp_path)
    shards = f"[{{shards: {world}/shards}}]"
    where = ["output=trained", f"model.post_llm.from_pretrained={world}/llm", f"data.tokenizer={world}/llm"]
    tiny = ["model.patch_embedding={width: 16, patch_size: 4}", "model.pre_buffer.depth=1", "data.seq_len=256"]
    short = ["stage.steps=2", "stage.warmup_steps=1", "stage.validate_every=2", "stage.predictions=2"]
    pixels = ["data.min_pixels=1024", "data.max_pixels=1024"]
    data = [f"data.train={shards}", f"data.validation={shards}", "data.text_validation=[]"]
    out = run(installed / "neo", "train", "mine.yaml", *where, *tiny, *short, *pixels, *data, folder=tmp_path)
    assert "model: trained/neo" in out and "validation loss" in out
    assert {p.name for p in tmp_path.iterdir()} == {"mine.yaml", "trained"}
    assert weights_of(tmp_path / "trained" / "neo")["pre_buffer.boundary"].shape == (2, 32)
    asked = run(installed / "neo", "chat", "trained/neo", "hi", "--image", world / "red.png", folder=tmp_path)
    assert asked.endswith("\n")
