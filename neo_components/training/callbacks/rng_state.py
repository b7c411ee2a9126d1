"""Random numbers in checkpoints, so that what draws from them in training goes on as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class RandomStates(Callback):
    """Keeps the state of every process's random numbers in the checkpoints: Python's, numpy's and torch's.

    Lightning keeps none. A run that goes on with another number of processes keeps those that its seed gave it.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Of all processes, in plain values; every process has to ask for it."""
        states = [random_states()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = states * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, random_states())
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """They are set when the first batch begins, as making a loader draws from them."""
        self._restored = state_dict["processes"]

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Goes on where the checkpoint was saved."""
        if len(self._restored) == trainer.world_size:
            set_random_states(self._restored[trainer.global_rank])
        self._restored = []


def random_states() -> dict[str, Any]:
    """Where the generators of Python, numpy, torch, and this process's GPU are, in plain values."""
    drawn: Any = np.random.get_state(legacy=True)
    kind, keys, place, has_gauss, gauss = drawn
    version, numbers, following = random.getstate()
    return {
        "python": [version, list(numbers), following],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Sets what :func:`random_states` told."""
    version, numbers, following = states["python"]
    random.setstate((version, tuple(numbers), following))
    kind, keys, place, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), place, has_gauss, gauss))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
