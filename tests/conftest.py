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
