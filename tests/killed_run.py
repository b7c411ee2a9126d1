"""One run of ``tests/test_data_kill.py``: ``python killed_run.py WORLD FOLDER [--delay 0.1] [--ranks 2] ...``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from llm_builders import native_model

from neo_components.data import NEODataModule, Source
from neo_components.recipe.stage import StageConfig
from neo_components.training.callbacks.rng_state import RandomStates, random_states
from neo_components.training.callbacks.signals import SaveOnSignal
from neo_components.training.checkpoints import AtomicCheckpointIO, newest_checkpoint
from neo_components.training.module import NEOTraining
from neo_components.types import Batch

STEPS, RANKS, WORKERS, EVERY = 24, 2, 2, 3


def digest(value: Any) -> str:
    """A checksum of plain values and tensors, bit for bit."""
    if isinstance(value, torch.Tensor):
        content = f"{value.dtype} {tuple(value.shape)}".encode() + value.detach().contiguous().numpy().tobytes()
    elif isinstance(value, dict):
        content = "".join(f"{key!r} {digest(value[key])}," for key in sorted(value)).encode()
    elif isinstance(value, (list, tuple)):
        content = ",".join(map(digest, value)).encode()
    else:
        content = repr(value).encode()
    return hashlib.sha256(content).hexdigest()


class Record(lightning.Callback):
    """Appends what each rank trained on, and its loss, to a file of its own, at once."""

    def __init__(self, folder: Path, delay: float) -> None:
        self.folder, self.delay = folder, delay

    def on_train_batch_start(self, *arguments: Any) -> None:
        torch.rand(1)  # something that random numbers are used for
        time.sleep(self.delay)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        line = {
            "step": trainer.global_step,
            "keys": batch.keys,
            "loss": float(outputs["loss"]).hex(),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "random": digest(random_states()),
        }
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """What is left of the run: the weights, the optimizer, the schedule and the place in the data."""
        end = {
            "weights": digest(module.state_dict()),
            "optimizer": digest(trainer.optimizers[0].state_dict()),
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict()["last_epoch"],
            "data": digest(trainer.datamodule.state_dict()),
        }
        (self.folder / f"end{trainer.global_rank}.json").write_text(json.dumps(end))


def run(options: argparse.Namespace) -> None:
    """Trains from the newest checkpoint of the folder, or from the beginning, to the last step."""
    lightning.seed_everything(0, verbose=False)
    stage = StageConfig(train=("all",), steps=options.steps, warmup_steps=2)
    module = NEOTraining(native_model(options.world / "llm"), stage)
    settings: dict[str, Any] = {"seq_len": 256, "min_pixels": 1024, "max_pixels": 4096, "shuffle": 30}
    sources = [Source(str(options.world / "pictures"), 0.7), Source(str(options.world / "text"), 0.3)]
    data = NEODataModule(str(options.world / "llm"), sources, workers=options.workers, seed=5, **settings)
    data.input_spec = module.model.input_spec
    checkpoints = options.folder / "checkpoints"
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        checkpoints, "{step:03d}", every_n_train_steps=EVERY, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=options.ranks,
        strategy=options.strategy if options.ranks > 1 else "auto",
        max_steps=options.steps,
        callbacks=[RandomStates(), saving, Record(options.folder, options.delay), SaveOnSignal(checkpoints)],
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    found = newest_checkpoint(checkpoints) if list(checkpoints.glob("*.ckpt")) else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=found, weights_only=True)
    except SIGTERMException:
        sys.exit(143)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("world", type=Path)
    parser.add_argument("folder", type=Path)
    for name, default in (("ranks", RANKS), ("workers", WORKERS), ("steps", STEPS)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--strategy", default="ddp_fork")
    run(parser.parse_args())
