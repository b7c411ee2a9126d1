"""What every test needs: no network, no display, the same random numbers each time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Set before any test imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from filelock import FileLock

# The tests' models are tiny: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu-device", default="cuda", choices=["cuda", "cpu"],
        help="where tests marked gpu run; cpu rehearses them without a GPU",
    )  # fmt: skip


@pytest.fixture(scope="session")
def gpu_device(request: pytest.FixtureRequest) -> torch.device:
    """The device of the tests marked ``gpu``; without a GPU they fail, as a skipped test would hide that none ran."""
    device = torch.device(request.config.getoption("--gpu-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.fail("torch finds no GPU here; --gpu-device cpu rehearses these tests")
    return device


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """``tests/data``: small reference files."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of everything that the commands read, to be left as it is."""
    from commands import build_world

    return made_once(tmp_path_factory, "world", build_world)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of the main job at a fiftieth of its steps: the real command, the shipped recipes."""
    from commands import installed_neo

    def run(folder: Path) -> Path:
        done = installed_neo("quickstart", "--scale", "0.02", "-o", "out", folder=folder)
        (folder / "stdout.txt").write_text(done.out)
        (folder / "stderr.txt").write_text(done.err)
        assert done.status == 0, done.err
        return folder / "out"

    return made_once(tmp_path_factory, "quick start", run)  # the space must do no harm


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]) -> Path:
    """What ``make`` builds in a folder of that name, once for all processes of a test run.

    Returns:
        The path that ``make`` returned.
    """
    workers = "PYTEST_XDIST_WORKER" in os.environ
    root = factory.getbasetemp().parent if workers else factory.getbasetemp()
    folder, done = root / name, root / f"{name}.txt"
    with FileLock(root / f"{name}.lock"):
        if not done.is_file():
            folder.mkdir()  # fails if another process failed here
            done.write_text(str(make(folder)))
    return Path(done.read_text())
