"""Several processes train as one does; averaged weights are the exponential average of the steps'."""

from __future__ import annotations

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from builders import tiny_model
from lightning.pytorch.callbacks import Callback
from test_faults import fit, rows

from neo_components import Batch
from neo_components.training.callbacks.performance import Performance
from neo_components.training.callbacks.progress import averaging
from neo_components.training.module import NEOTraining


def losses_of(module: lightning.LightningModule) -> float:
    return float(module.trainer.callback_metrics["train/loss"])


def told(module: lightning.LightningModule) -> dict[str, float]:
    """What must not depend on how rows are divided among processes."""
    assert isinstance(module, NEOTraining)
    return module.losses_by_part | {
        "perf/packing_efficiency": float(module.trainer.callback_metrics["perf/packing_efficiency"])
    }


CONSTANT: dict[str, Any] = {"min_lr_ratio": 1.0, "eps": 1e-3}
"""Without AdamW's eps a gradient of nearly zero would step by its sign, which rounding decides."""


def process(rank: int, port: int, folder: Path) -> None:
    """One of two processes as torchrun starts them: steps of one row each, then of two accumulated ones."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    for accumulate in (1, 2):
        model = tiny_model()
        mine = rows(model.input_spec, 4)[rank::2]
        options: dict[str, Any] = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        counted = Performance()
        options |= {"log_every_n_steps": 1, "callbacks": [counted]}
        module = fit(model, mine, stage=CONSTANT, accumulate_grad_batches=accumulate, **options)
        seen = losses_of(module), told(module), counted.tokens, counted.images
        torch.save((model.state_dict(), seen), folder / f"{accumulate}-{rank}.pt")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Rows of very different numbers of labels, so that a mean of the processes' means would be another loss."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=process, args=(rank, port, tmp_path)) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(240)
        assert each.exitcode == 0
    for accumulate in (1, 2):
        one = tiny_model()
        made, size = rows(one.input_spec, 4), 2 * accumulate
        counted = Performance()
        options: dict[str, Any] = {"log_every_n_steps": 1, "callbacks": [counted]}
        module = fit(one, [Batch.stack(made[n : n + size]) for n in range(0, 4, size)], stage=CONSTANT, **options)
        assert set(told(module)) == {"loss_by_modality/text", "loss_by_modality/image", "perf/packing_efficiency"}
        for rank in range(2):
            state, (loss, parts, tokens, images) = torch.load(tmp_path / f"{accumulate}-{rank}.pt", weights_only=True)
            assert loss == pytest.approx(losses_of(module), abs=1e-5)
            assert parts == pytest.approx(told(module), abs=1e-5)
            assert (tokens, images) == (counted.tokens, counted.images) == (counted.tokens, 4)
            for name, weight in one.state_dict().items():
                assert torch.allclose(weight, state[name], atol=1e-5), name


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
