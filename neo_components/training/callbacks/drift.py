"""How far the weights have moved from where the stage began."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from neo_components.training.callbacks.loggers import log_once
from neo_components.training.fsdp2.tensors import whole
from neo_components.training.lora import adapted_weights, lora_parameters, with_change
from neo_components.training.module import NEOTraining

SAMPLED = 4096
"""Weights of each tensor that are watched; a smaller tensor is watched whole."""


class Drift(Callback):
    """Logs ``drift/GROUP``: the distance of a group's weights from the start of the stage, over their length then (L2).

    Watched are 4,096 weights of each tensor at fixed random places, whose start lies on the CPU: no second copy of the
    model. The squares of a tensor's sample stand for all of it, by its share; the estimate of a tensor no larger than
    that is exact. Low-rank adapters count as the change that they make. The start is kept in checkpoints.

    Measured at every ``every``-th step, and at the last.

    Args:
        every: steps between measurements; 0: only at the end.
        last: number of the last step.
    """

    def __init__(self, every: int, last: int) -> None:
        self.every, self.last = every, last
        self.start: dict[str, Tensor] = {}
        self.values: dict[str, float] = {}
        self._measured = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Keeps the start, unless a checkpoint brought it."""
        assert isinstance(module, NEOTraining)
        self._measured = trainer.global_step
        self.start = self.start or samples(module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures where it is time."""
        step = trainer.global_step
        if step > self._measured and (step == self.last or (self.every and step % self.every == 0)):
            assert isinstance(module, NEOTraining)
            self._measured = step
            self.values = drift(module, self.start)
            log_once(trainer, self.values, step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The start, for a checkpoint."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The start of the run that is gone on with."""
        self.start = dict(state_dict["start"])


@torch.no_grad()
def samples(module: NEOTraining) -> dict[str, Tensor]:
    """Watched weights of every tensor by name, [n] float32 on the CPU; adapters count in their layers."""
    adapted = adapted_weights(module.model)
    adapters = set(map(id, lora_parameters(module.model)))
    found = {}
    for name, parameter in module.model.named_parameters():
        if id(parameter) not in adapters:
            layer = adapted.get(id(parameter))
            found[name] = _sample(name, parameter if layer is None else with_change(parameter, layer))
    return found


def _sample(name: str, weight: Tensor) -> Tensor:
    """The same places every time, however the tensor is divided among processes."""
    weight = whole(weight).detach().flatten()
    if len(weight) > SAMPLED:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight = weight[torch.randint(len(weight), (SAMPLED,), generator=generator).to(weight.device)]
    return weight.float().cpu().clone()


def drift(module: NEOTraining, start: Mapping[str, Tensor]) -> dict[str, float]:
    """``drift/GROUP`` of each group that learns; a group of zeros has no length and is left out.

    Args:
        module: the training.
        start: from :func:`samples`.
    """
    now = samples(module)
    squares: dict[int, tuple[float, float]] = {}
    for name, parameter in module.model.named_parameters():
        if name in now:
            share = parameter.numel() / len(now[name])
            moved, length = (now[name] - start[name]).square().sum(), start[name].square().sum()
            squares[id(parameter)] = share * float(moved), share * float(length)
    found = {}
    groups = {name: module.model.groups()[name] for name in module.groups if name in module.model.groups()}
    for name, parameters in groups.items():
        mine = [squares[id(parameter)] for parameter in parameters if id(parameter) in squares]
        moved, length = (sum(column) for column in zip(*mine, strict=True))
        if length > 0:
            found[f"drift/{name}"] = (moved / length) ** 0.5
    return found
