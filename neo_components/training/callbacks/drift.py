"""Weight drift: the relative distance of the weights from the start of the stage."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from neo_components.storage.shards import full_tensor
from neo_components.training.callbacks.loggers import log_once
from neo_components.training.lora import adapted_weights, lora_parameters, merged_weight
from neo_components.training.module import NEOTraining

SAMPLED = 4096
"""Number of sampled weights per tensor; a smaller tensor is used completely."""


class Drift(Callback):
    """Logs ``drift/GROUP``: the L2 distance of a group's weights from their initial values, relative to their norm.

    Samples 4,096 weights of each tensor at fixed random positions and keeps their initial values on the CPU, so there
    is no second copy of the model. Squared sums are scaled from the sample to the tensor; for a tensor of at most 4,096
    weights the result is exact. A low-rank adapter counts as the update that it makes. The initial values are saved in
    checkpoints.

    Measured at every ``every``-th step and at the last step.

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
        """Samples the initial weights, unless a checkpoint has restored them."""
        assert isinstance(module, NEOTraining)
        self._measured = trainer.global_step
        self.start = self.start or samples(module)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures and logs the drift."""
        step = trainer.global_step
        if step > self._measured and (step == self.last or (self.every and step % self.every == 0)):
            assert isinstance(module, NEOTraining)
            self._measured = step
            self.values = drift(module, self.start)
            log_once(trainer, self.values, step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The initial weights, for a checkpoint."""
        return {"start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the initial weights of the resumed run."""
        self.start = dict(state_dict["start"])


@torch.no_grad()
def samples(module: NEOTraining) -> dict[str, Tensor]:
    """Sampled weights of every tensor by name, [n] float32 on the CPU; adapted weights include their update."""
    adapted = adapted_weights(module.model)
    adapters = set(map(id, lora_parameters(module.model)))
    found = {}
    for name, parameter in module.model.named_parameters():
        if id(parameter) not in adapters:
            layer = adapted.get(id(parameter))
            found[name] = _sample(name, parameter if layer is None else merged_weight(parameter, layer))
    return found


def _sample(name: str, weight: Tensor) -> Tensor:
    """Sampled weights at positions that depend on the name only, also for a sharded tensor."""
    weight = full_tensor(weight).detach().flatten()
    if len(weight) > SAMPLED:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        weight = weight[torch.randint(len(weight), (SAMPLED,), generator=generator).to(weight.device)]
    return weight.float().cpu().clone()


def drift(module: NEOTraining, start: Mapping[str, Tensor]) -> dict[str, float]:
    """``drift/GROUP`` of each trainable group; a group whose initial weights are all zero is left out.

    Args:
        module: the training module.
        start: from :func:`samples`.
    """
    now = samples(module)
    squares: dict[int, tuple[float, float]] = {}
    for name, parameter in module.model.named_parameters():
        if name in now:
            scale = parameter.numel() / len(now[name])
            moved, initial = (now[name] - start[name]).square().sum(), start[name].square().sum()
            squares[id(parameter)] = scale * float(moved), scale * float(initial)
    found = {}
    groups = {name: module.model.groups()[name] for name in module.groups if name in module.model.groups()}
    for name, parameters in groups.items():
        mine = [squares[id(parameter)] for parameter in parameters if id(parameter) in squares]
        moved, initial = (sum(column) for column in zip(*mine, strict=True))
        if initial > 0:
            found[f"drift/{name}"] = (moved / initial) ** 0.5
    return found
