"""One run of ``tests/test_uneven_ranks.py``: ``python uneven_ranks.py STEPS FOLDER MODEL ...``.

Two gloo processes train at each step on batches of different kinds, drawn for each rank alone: nothing of the one
needs to be anything of the other.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from builders import SIZES, random_sample, randomize, tiny_model
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from neo_components import NEO, Batch, PatchEmbedding, PostLLM, PreBuffer, pack
from neo_components.components.bridge import Bridge
from neo_components.data.packed import BatchMaker
from neo_components.data.samples import SampleMaker
from neo_components.recipe.stage import StageConfig
from neo_components.training.module import NEOTraining
from neo_components.types import InputSpec

LENGTH, RANKS = 96, 2


def bridged(text: str) -> NEO:
    """Its pre-Buffer has another width than its post-LLM."""
    pre, post = SIZES | {"hidden_size": 24}, SIZES
    stacks = PreBuffer(depth=2, **pre), PostLLM(60, depth=2, image_token_id=57, **post)
    bridges = {"bridge_out": Bridge(24, 32)} | ({"bridge_in": Bridge(32, 24)} if text == "shared" else {})
    model = NEO(PatchEmbedding(24, width=16, patch_size=4), *stacks, **bridges, text=text)
    randomize(model)
    return model


MODELS: dict[str, tuple[Callable[[], NEO], dict[str, Any]]] = {
    "plain": (tiny_model, {}),
    "tied": (lambda: tiny_model(post={"tie_embeddings": True}), {}),
    "recomputed": (tiny_model, {"activation_checkpointing": 1.0}),
    "experts": (lambda: tiny_model(num_experts=4, experts_per_token=2), {}),
    "bridged": (lambda: bridged("shared"), {}),
    "bypass": (lambda: bridged("bypass"), {}),
    "few groups": (tiny_model, {"train": ("patch_embedding", "pre_buffer", "post_llm.hw")}),
    "head alone": (tiny_model, {"train": ("post_llm.head",)}),
}
"""What can be trained, and how its stage differs."""

KINDS = ("images", "text", "images, nothing learnt", "text, nothing learnt", "padding")


def batch_of(kind: str, spec: InputSpec, seed: int) -> Batch:
    """A row of that kind."""
    if kind == "padding":  # what a row of samples that were all skipped becomes
        maker = SampleMaker(None, spec, 64, 1024)  # type: ignore[arg-type] - no text is read
        return BatchMaker([], maker, LENGTH).batch([])[0]
    images = 1 if kind.startswith("images") else 0
    sample = random_sample(spec, seed, images=images, learn="nothing" not in kind)
    return pack([sample], spec, seq_len=LENGTH)


class Uneven(IterableDataset[Batch]):
    """Each rank's own kinds, in random order."""

    def __init__(self, spec: InputSpec, steps: int) -> None:
        self.spec, self.steps = spec, steps

    def __iter__(self) -> Iterator[Batch]:
        rank = torch.distributed.get_rank()
        choose = random.Random(rank)
        for step in range(self.steps):
            yield batch_of(choose.choice(KINDS), self.spec, 2 * step + rank)


class Watch(lightning.Callback):
    """No parameter that learns is without a gradient, on any rank, at any step."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, f"step {trainer.global_step}, rank {trainer.global_rank}: no gradient of {without}"


class Ended(lightning.Callback):
    """Leaves what each rank ended with."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file = folder / name

    def on_train_end(self, trainer: Any, module: Any) -> None:
        total = [float(p.detach().double().sum()) for p in module.parameters()]
        found = {"steps": trainer.global_step, "skipped": module.skipped_steps, "weights": total}
        self.file.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(found))


def run(name: str, steps: int, folder: Path) -> None:
    make, options = MODELS[name]
    stage = StageConfig(**({"train": ("all",), "steps": steps, "lr": 1e-3} | options))
    module = NEOTraining(make(), stage)
    # A rank that waits for a gradient that never comes ends the run after this time.
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork", timeout=timedelta(seconds=120))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [Watch(), Ended(folder, name)]
    limits: dict[str, Any] = {"max_steps": steps, "max_epochs": 1, "gradient_clip_val": 1.0}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, callbacks=callbacks, **limits, **quiet
    )
    trainer.fit(module, DataLoader(Uneven(module.model.input_spec, steps), batch_size=None))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        run(name, int(sys.argv[1]), Path(sys.argv[2]))
