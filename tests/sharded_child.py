"""One process of ``tests/test_sharding.py``: ``torchrun ... sharded_child.py PLAN.json`` makes the runs of a plan.

``make_run`` is also called by the tests themselves, as the one process that all others are compared with.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from builders import random_sample
from torch.utils.data import DataLoader

from neo_components import NEO, Batch, InputSpec, pack
from neo_components.recipe.stage import StageConfig
from neo_components.storage.deferred import Deferred
from neo_components.storage.shards import full_tensor
from neo_components.storage.weights import save_tensors
from neo_components.training.callbacks.progress import averaging
from neo_components.training.fsdp2.average import ShardedAverage
from neo_components.training.fsdp2.norms import gradient_norms
from neo_components.training.fsdp2.strategy import FSDP2Strategy, ShardedTraining, policy_of, reshard
from neo_components.training.module import NEOTraining

ROWS = 4
"""Rows of a step on all processes together."""


def row(spec: InputSpec, step: int, number: int) -> Batch:
    """Of very different numbers of labels; the second half of a step's rows are without images, one without labels."""
    images = 1 + step % 2 if number < ROWS // 2 else 0
    learn = (step, number) != (1, ROWS - 1)
    texts = (2 + 3 * number, 4 + 5 * number)
    samples = [random_sample(spec, 100 * step + 10 * number + n, images, texts, learn) for n in range(2)]
    return pack(samples, spec, seq_len=200)


def batches(spec: InputSpec, steps: range, rank: int, ranks: int, poisoned: int | None = None) -> list[Batch]:
    """What one of several processes gets of each step."""
    share = ROWS // ranks
    made = [Batch.stack([row(spec, step, n) for n in range(share * rank, share * (rank + 1))]) for step in steps]
    if poisoned is not None and rank == 0:
        made[poisoned].patches[0, 0] = float("nan")
    return made


class Record(lightning.Callback):
    """Loss and gradient norms of each step, and how many rows of the weights this process holds."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.held = 1.0

    def on_train_batch_end(self, trainer: Any, module: Any, *rest: Any) -> None:
        names = ("train/loss", "train/grad_norm", "grad_norm/pre_buffer", "train/skipped_steps")
        self.seen.append({name: float(trainer.callback_metrics[name]) for name in names})

    def on_train_start(self, trainer: Any, module: Any) -> None:
        local = [p.to_local() if hasattr(p, "to_local") else p for p in module.parameters()]
        self.held = sum(p.numel() for p in local) / sum(p.numel() for p in module.parameters())

    def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norms = gradient_norms(module.trainable)
        self.clipped = float(torch.stack(list(norms.values())).norm()) if norms else 0.0


def make_run(
    folder: str,
    strategy: str = "auto",
    steps: tuple[int, int] = (0, 4),
    train: tuple[str, ...] = ("all",),
    save: str | None = None,
    resume: str | None = None,
    weights: str | None = None,
    precision: str = "32-true",
    poisoned: int | None = None,
    **stage: Any,
) -> dict[str, Any]:
    """Trains a model on the rows of some steps; on each process those that are its own.

    Returns:
        Losses and norms of each step, the validation loss, the share of the weights that each process held, and the
        norm that was left after clipping.
    """
    config = StageConfig(train=train, steps=4, lr=3e-3, **stage)  # type: ignore[arg-type]
    record = Record()
    if strategy == "fsdp2":
        with Deferred() as deferred:
            model = NEO.from_pretrained(folder)
        module: NEOTraining = ShardedTraining(model, config, deferred, policy_of(precision))
    else:
        model = NEO.from_pretrained(folder)
        module = NEOTraining(model, config)
    callbacks: list[lightning.Callback] = [record]
    if config.ema:
        callbacks.insert(0, (ShardedAverage if strategy == "fsdp2" else averaging)(config.ema))
    many = torch.distributed.is_torchelastic_launched()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=torch.distributed.get_world_size() if _started() else _ranks(many),
        strategy=FSDP2Strategy() if strategy == "fsdp2" else strategy, max_steps=steps[1], gradient_clip_val=0.5,
        callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=1,
        val_check_interval=steps[1] - steps[0], check_val_every_n_epoch=None,
    )  # fmt: skip
    rank, ranks = trainer.global_rank, trainer.world_size
    mine = batches(model.input_spec, range(*steps), rank, ranks, poisoned)
    held_out = batches(model.input_spec, range(7, 9), rank, ranks)
    loaders = (DataLoader(part, batch_size=None) for part in (mine, held_out))
    trainer.fit(module, *loaders, ckpt_path=resume, weights_only=True)
    if save:
        trainer.save_checkpoint(save)
    if strategy == "fsdp2":
        reshard(model)
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    if weights and rank == 0:
        save_tensors(Path(weights), state)
    val_loss = float(trainer.callback_metrics["val/loss"])
    return {"steps": record.seen, "val_loss": val_loss, "held": record.held, "clipped": record.clipped}


def _started() -> bool:
    return torch.distributed.is_initialized()


def _ranks(many: bool) -> int:
    import os

    return int(os.environ["WORLD_SIZE"]) if many else 1


def main(plan: Path) -> None:
    torch.set_num_threads(1)
    results = [make_run(**run) for run in json.loads(plan.read_text())]
    rank = torch.distributed.get_rank()
    plan.with_name(f"{plan.stem}.rank{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()  # its threads can abort a process that ends with them


if __name__ == "__main__":
    main(Path(sys.argv[1]))
