"""One run of ``tests/test_data_kill.py``: ``python killed_run.py WORLD FOLDER DELAY [STEPS]``."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from llm_builders import native_model

from neo_components.data import NEODataModule, Source
from neo_components.training.module import NEOTraining
from neo_components.training.stage import StageConfig
from neo_components.types import Batch

STEPS, RANKS, WORKERS, EVERY = 24, 2, 2, 3


class Record(lightning.Callback):
    """Appends what each rank trained on, and its loss, to a file of its own, at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        line = {"step": trainer.global_step, "keys": batch.keys, "loss": float(outputs["loss"]).hex()}
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def run(world: Path, folder: Path, delay: float, steps: int = STEPS) -> None:
    """Trains from the newest checkpoint of the folder, or from the beginning, to the last step."""
    torch.manual_seed(0)
    stage = StageConfig(train=("all",), steps=steps, warmup_steps=2)
    module = NEOTraining(native_model(world / "llm"), stage)
    options: dict[str, Any] = {"row_length": 256, "min_pixels": 1024, "max_pixels": 4096, "shuffle": 30}
    sources = [Source(str(world / "pictures"), 0.7), Source(str(world / "text"), 0.3)]
    data = NEODataModule(str(world / "llm"), sources, workers=WORKERS, seed=5, **options)
    data.input_spec = module.model.input_spec
    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder / "checkpoints", "{step:03d}", every_n_train_steps=EVERY, save_top_k=-1, auto_insert_metric_name=False
    )

    class Slow(Record):
        def on_train_batch_start(self, *arguments: Any) -> None:
            time.sleep(delay)

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp_fork",
        max_steps=steps,
        callbacks=[saving, Slow(folder)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    trainer.fit(module, datamodule=data, ckpt_path=checkpoints[-1] if checkpoints else None, weights_only=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
