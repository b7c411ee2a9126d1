"""States of the random number generators in checkpoints, so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class RandomStates(Callback):
    """Saves the states of Python's, numpy's and torch's generators of every process, which Lightning does not.

    A run that resumes on another number of processes starts from the states that its seed gives.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes as plain values. Every process must call it."""
        states = [random_states()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = states * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, random_states())
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until the first batch, as creating a data loader draws random numbers."""
        self._restored = state_dict["processes"]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the restored states."""
        if len(self._restored) == trainer.world_size:
            set_random_states(self._restored[trainer.global_rank])
        self._restored = []


def random_states() -> dict[str, Any]:
    """States of the generators of Python, numpy, torch and this process's GPU, as plain values."""
    drawn: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = drawn
    version, numbers, following = random.getstate()
    return {
        "python": [version, list(numbers), following],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Sets the states that :func:`random_states` returned."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
