"""Several processes train as one does; averaged weights are the exponential average of the steps'."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import pytest
import torch
from builders import tiny_model
from lightning.pytorch.callbacks import Callback
from test_faults import fit, rows

from neo_components import Batch
from neo_components.training.callbacks import averaging


def losses_of(module: lightning.LightningModule) -> float:
    return float(module.trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_train_as_one(accumulate: int) -> None:
    """Rows of very different numbers of labels, so that a mean of the processes' means would be another loss."""
    one, two = tiny_model(), tiny_model()
    made = rows(one.input_spec, 4)
    size = 2 * accumulate
    whole = [Batch.stack(made[n : n + size]) for n in range(0, 4, size)]
    options: dict[str, Any] = {"stage": {"min_lr_ratio": 1.0, "eps": 1e-3}}
    a = fit(one, whole, **copy.deepcopy(options))
    b = fit(two, made, strategy="ddp_spawn", devices=2, accumulate_grad_batches=accumulate, **options)
    assert losses_of(b) == pytest.approx(losses_of(a), abs=1e-5)
    for (name, x), y in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.allclose(x, y[1], atol=1e-5), name


class Weights(Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        self.seen.append([p.detach().clone() for p in module.model.parameters()])


def test_averaged_weights() -> None:
    model, averaged = tiny_model(), tiny_model()
    made, weights = rows(model.input_spec, 3), Weights()
    fit(model, made, callbacks=[weights])
    fit(averaged, made, callbacks=[averaging(0.75)])
    expected = weights.seen[0]
    for step in weights.seen[1:]:
        expected = [0.75 * a + 0.25 * b for a, b in zip(expected, step, strict=True)]
    for (name, p), e in zip(averaged.named_parameters(), expected, strict=True):
        assert torch.allclose(p, e, atol=1e-6), name
    assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, weights.seen[-1], strict=True))
