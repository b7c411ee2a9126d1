"""An exponential moving average of sharded weights: each process averages its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from neo_components.training.fsdp2.checkpoints import read_average
from neo_components.training.fsdp2.strategy import reshard


class ShardedAverage(Callback):
    """Averages the trainable weights; validation and the trained model use the average, checkpoints have both.

    Equals Lightning's ``EMAWeightAveraging``, which copies full models: the average starts as the weights after the
    first step.

    Args:
        decay: weight of the previous average, for example 0.999.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.updated = 0
        self._swapped = False

    def on_fit_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Allocates the average."""
        self.average = {name: weight.detach().clone() for name, weight in self._weights(module).items()}

    def _weights(self, module: lightning.LightningModule) -> dict[str, Tensor]:
        reshard(module)
        return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule, *rest: Any) -> None:
        """Updates the average."""
        if trainer.global_step <= self.updated:
            return
        for name, weight in self._weights(module).items():
            if self.updated:
                self.average[name].lerp_(weight, 1 - self.decay)
            else:
                self.average[name].copy_(weight)
        self.updated = trainer.global_step

    def on_validation_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Swaps in the average, if there is one."""
        if self.updated:
            self._swap(module)

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Swaps the training weights back in."""
        if self._swapped:
            self._swap(module)

    @torch.no_grad()
    def _swap(self, module: lightning.LightningModule) -> None:
        for name, weight in self._weights(module).items():
            training = weight.detach().clone()
            weight.copy_(self.average[name])
            self.average[name].copy_(training)
        self._swapped = not self._swapped

    @torch.no_grad()
    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Makes the average the trained model."""
        for name, weight in self._weights(module).items():
            weight.copy_(self.average[name])

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the average. A checkpoint during a validation, with swapped weights, is saved unswapped."""
        held = {name: weight for name, weight in checkpoint["state_dict"].items() if name in self.average}
        checkpoint["average"] = dict(self.average)
        if self._swapped:
            checkpoint["state_dict"] |= self.average
            checkpoint["average"] = held

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restores the average; without one in the checkpoint, averaging starts at the next step."""
        if read_average(Path(checkpoint["folder"]), self.average):
            self.updated = checkpoint["global_step"]
