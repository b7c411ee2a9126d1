"""The built wheel works alone: in another environment, from any folder, with its recipes inside."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, folder: Path) -> str:
    """Standard output of a command that succeeds; nothing of this checkout is on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["COLUMNS"] = "200"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built with the installed hatchling: no download."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, folder=folder)
    [file] = folder.glob("*.whl")
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


def test_wheel_holds_code_and_recipes_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    code = {file.relative_to(ROOT).as_posix() for file in (ROOT / "neo_components").rglob("*.py")}
    recipes = {f"neo_components/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "recipes").rglob("*.yaml")}
    assert recipes
    assert code | recipes <= files
    assert {file.split("/")[0] for file in files} == {"neo_components", f"neo_components-{_version(wheel)}.dist-info"}


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
