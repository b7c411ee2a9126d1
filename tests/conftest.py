"""What every test needs: no network, no display, the same random numbers each time."""

from __future__ import annotations

import os
from pathlib import Path

# Set before any test imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

# The tests' models are tiny: more threads only wait for each other.
torch.set_num_threads(1)


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

    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of the main job at a fiftieth of its steps: the real command, the shipped recipes."""
    from commands import installed_neo

    folder = tmp_path_factory.mktemp("quick start")  # the space must do no harm
    done = installed_neo("quickstart", "--scale", "0.02", "-o", "out", folder=folder)
    (folder / "stdout.txt").write_text(done.out)
    (folder / "stderr.txt").write_text(done.err)
    assert done.status == 0, done.err
    return folder / "out"
