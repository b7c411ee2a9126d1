"""What a pretrained pre-Buffer saves on tasks that it never saw, against random weights of the same shapes.

    neo data pretrain-mix outputs/mix                     # held-out pictures of each source
    python benchmarks/reuse.py run --source pretrained:small --mix outputs/mix
    python benchmarks/reuse.py run --source pretrained:small --mix outputs/mix --smollm2 FOLDER --llms smollm2
    python benchmarks/reuse.py report --figures docs/figures
    python benchmarks/reuse.py report --root benchmarks/results      # the arms of docs/results/reuse.md

``run`` makes the target tasks (reuse_tasks.py) and the small language model (reuse_setting.py), fits linear probes on
frozen features (reuse_probe.py), then trains arm after arm. An arm is one choice of

- weights of the pre-Buffer: ``reused``; ``random``, new ones of the same shapes; ``whitened``, new ones with the patch
  embedding whitened on the task's images. The better of the last two on each task is the control.
- what trains: ``tuned``, everything; ``frozen``, everything but pre-Buffer and patch embedding.
- the way of text: ``bypass``, around the pre-Buffer; ``shared``, through it.

Arms that differ in the weights alone are compared: recipe, bridges, data, their order, schedule and budget are the same
for one seed, and a seed changes initial weights and data order. The arms of new weights train longer, to show the loss
that they reach. With ``--pairs 100 1000`` arms train on so many question-answer pairs only.

Every arm is one line of ``arms.jsonl`` when it is done, and one that is there already is not run again, so a run can
be stopped, continued, and shared by several processes with other tasks, seeds or language models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import reuse_setting as setting
import torch
from lightning.pytorch.callbacks import Callback
from reuse_report import report
from reuse_tasks import PAIRS, TASKS, card_of, make_task, test_folder, train_folder

from neo_components.data import load_tokenizer
from neo_components.data.module import NEODataModule
from neo_components.evaluation import evaluate, questions_from_shards
from neo_components.recipe import Recipe, load_recipe
from neo_components.training.start import start, whiten

WEIGHTS = {
    "random": ["model.pre_buffer.reset=true"],
    "whitened": ["model.pre_buffer.reset=true", "stage.whiten_patches=20000"],
    "reused": [],
}
TRAIN = {"tuned": ["stage.train=[all]"], "frozen": ["stage.train=[bridge, post_llm]"]}
TEXT = {"bypass": ["model.text=bypass"], "shared": ["model.text=shared"]}
SEED = 1000
"""Added to an arm's seed: no arm starts from the numbers that a source started from."""


@dataclass
class Arm:
    """One arm: (step, validation loss), (step, exact match by kind of question), seconds with all of that.

    ``blind`` is the exact match of the most frequent answer to each question.
    """

    weights: str
    train: str
    text: str
    llm: str
    task: str
    source: str
    pairs: int
    seed: int
    steps: int
    device: str = ""
    blind: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    unexplained: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes it from other arms."""
        return tuple(asdict(self).values())[:9]


class Curve(Callback):
    """Keeps the validation losses, and answers the questions after some of the steps."""

    def __init__(self, ask: Callable[[], dict[str, float]], at: Container[int]) -> None:
        self.points: list[tuple[int, float]] = []
        self.scores: list[tuple[int, dict[str, float]]] = []
        self.ask, self.at = ask, at

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Adds one."""
        self.points.append((trainer.global_step, round(float(trainer.callback_metrics["val/loss"]), 5)))
        if trainer.global_step in self.at:
            self.scores.append((trainer.global_step, self.ask()))


def recipe_of(arm: Arm, options: argparse.Namespace) -> Recipe:
    """The recipe of an arm."""
    root, llm = options.root, options.folders[arm.llm]
    return load_recipe("quickstart/attach", [
        f"seed={SEED + arm.seed}", f"model.pre_buffer.from_pretrained={options.source}",
        f"model.post_llm.from_pretrained={llm}", f"data.tokenizer={llm}",
        f"data.train=[{{shards: {train_folder(root, arm.task, arm.pairs)}}}]",
        f"data.validation=[{{shards: {test_folder(root, arm.task)}}}]",
        f"stage.steps={arm.steps}", f"stage.validate_every={options.every}", "trainer.limit_val_batches=null",
        *setting.COMMON, *setting.SCHEDULES[arm.llm],
        *WEIGHTS[arm.weights], *TRAIN[arm.train], *TEXT[arm.text],
    ])  # fmt: skip


def train_arm(arm: Arm, options: argparse.Namespace) -> None:
    """Trains an arm and fills in what was measured."""
    began = time.monotonic()
    recipe = recipe_of(arm, options)
    lightning.seed_everything(recipe.seed, verbose=False)
    chat, module = start(recipe)
    model = chat.model
    bridges = {"in": model.bridge_in, "out": model.bridge_out}
    arm.unexplained = {n: b.unexplained for n, b in bridges.items() if b is not None and b.unexplained is not None}
    if recipe.stage.whiten_patches:
        whiten(recipe, model)
    asked = list(itertools.islice(questions_from_shards(test_folder(options.root, arm.task)), options.questions))
    tokenizer = load_tokenizer(recipe.data["tokenizer"])

    def ask() -> dict[str, float]:
        limits = {"min_pixels": setting.PIXELS, "max_pixels": setting.PIXELS, "max_new_tokens": 12, "batch_size": 150}
        return evaluate(model, tokenizer, asked, progress=None, **limits).accuracy

    steps = setting.STEPS[arm.llm] if options.steps is None else options.steps
    curve = Curve(ask, (steps // 2, steps, arm.steps))
    trainer = lightning.Trainer(
        max_steps=arm.steps, val_check_interval=options.every, check_val_every_n_epoch=None, gradient_clip_val=1.0,
        num_sanity_val_steps=0, inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[curve],
        **recipe.trainer,
    )  # fmt: skip
    data = NEODataModule(**recipe.data)
    data.input_spec = model.input_spec
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    arm.curve, arm.scores, arm.seconds = curve.points, curve.scores, round(time.monotonic() - began, 1)
    arm.blind = card_of(options.root, arm.task)["blind"]
