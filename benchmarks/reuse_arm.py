"""One arm of benchmarks/reuse.py: what it is, its recipe, its training."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import reuse_setting as setting
import torch
from lightning.pytorch.callbacks import Callback
from reuse_tasks import PAIRS, card_of, test_folder, train_folder

from neo_components.data.module import NEODataModule
from neo_components.evaluation import evaluate, questions_from_shards
from neo_components.recipe import Recipe, load_recipe
from neo_components.training.callbacks.visual_geometry import NAMES, measured
from neo_components.training.start import start, whiten

WEIGHTS = {
    "random": ["model.pre_buffer.reset=true"],
    "whitened": ["model.pre_buffer.reset=true", "stage.whiten_patches=20000"],
    "reused": [],
}
TEXT = {"bypass": ["model.text=bypass"], "shared": ["model.text=shared"]}
SEED = 1000
"""Added to an arm's seed: no arm starts from the numbers that a source started from."""


@dataclass
class Arm:
    """One arm: (step, validation loss), (step, exact match by kind of question), geometry of visual tokens at the start
    and the end, CPU seconds with all of that.

    ``source`` names the asset and ``asset`` is the SHA-256 of its weights; ``data`` is that of the task's samples.
    ``pixels``, ``questions``, ``every`` and ``overrides`` are the options of the command line. ``blind`` is the exact
    match of the most frequent answer to each question.
    """

    weights: str
    train: str
    text: str
    llm: str
    task: str
    data: str
    source: str
    asset: str
    pairs: int
    seed: int
    steps: int
    pixels: int
    questions: int
    every: int
    overrides: list[str]
    device: str = ""
    blind: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    geometry: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    unexplained: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes it from other arms: not the source's name, but its weights."""
        what = (self.weights, self.train, self.text, self.llm, self.task, self.data, self.asset, self.pairs)
        return *what, self.seed, self.steps, *self.options

    @property
    def options(self) -> tuple[Any, ...]:
        """Those of the command line that all arms of a report share."""
        return self.pixels, self.questions, self.every, tuple(self.overrides)


class Curve(Callback):
    """Keeps the validation losses and the geometry of the visual tokens, and answers the questions after some of the
    steps."""

    def __init__(self, ask: Callable[[], dict[str, float]], at: Container[int]) -> None:
        self.points: list[tuple[int, float]] = []
        self.scores: list[tuple[int, dict[str, float]]] = []
        self.geometry: list[tuple[int, dict[str, float]]] = []
        self.ask, self.at = ask, at
        self._hook: Any = None
        self._measured: list[float] = []

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *which: int) -> None:
        """Watches what enters the language model in the first batch."""
        if batch_idx == 0:
            self._hook = module.model.post_llm.register_forward_pre_hook(self._measure, with_kwargs=True)

    def _measure(self, llm: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._measured = measured(arguments[0].float(), named["known"]).tolist()
        self._hook.remove()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Adds one."""
        step = trainer.global_step
        self.points.append((step, round(float(trainer.callback_metrics["val/loss"]), 5)))
        geometry = {name: round(value, 4) for name, value in zip(NAMES, self._measured, strict=True)}
        self.geometry = [*self.geometry[:1], (step, geometry)]
        if step in self.at:
            self.scores.append((step, self.ask()))


def recipe_of(arm: Arm, options: argparse.Namespace) -> Recipe:
    """The recipe of an arm."""
    root, llm = options.root, folder_of(arm.llm, options)
    return load_recipe(setting.RECIPES[arm.llm], [
        f"seed={SEED + arm.seed}", f"model.pre_buffer.from_pretrained={options.source}",
        f"model.post_llm.from_pretrained={llm}", f"data.tokenizer={llm}",
        f"data.train=[{{shards: {train_folder(root, arm.task, arm.pairs)}}}]",
        f"data.validation=[{{shards: {test_folder(root, arm.task)}}}]",
        f"stage.steps={arm.steps}", f"stage.validate_every={options.every}",
        f"data.min_pixels={options.pixels}", f"data.max_pixels={options.pixels}",
        *setting.COMMON, *setting.SCHEDULES[arm.llm],
        *WEIGHTS[arm.weights], f"stage.train={setting.TRAIN[arm.llm][arm.train]}", *TEXT[arm.text], *options.set,
    ])  # fmt: skip


def folder_of(llm: str, options: argparse.Namespace) -> Path:
    """Folder of a language model.

    Raises:
        ValueError: if it was not given.
    """
    folder: Path | None = options.root / "llm_small" if llm == setting.SMALL else getattr(options, llm)
    if folder is None:
        raise ValueError(f"language model {llm}: give its folder, --{llm} FOLDER")
    return folder


def train_arm(arm: Arm, options: argparse.Namespace) -> None:
    """Trains an arm and fills in what was measured."""
    began = time.process_time()
    recipe = recipe_of(arm, options)
    lightning.seed_everything(recipe.seed, verbose=False)
    chat, module = start(recipe)
    model = chat.model
    bridges = {"in": model.bridge_in, "out": model.bridge_out}
    arm.unexplained = {n: b.unexplained for n, b in bridges.items() if b is not None and b.unexplained is not None}
    if recipe.stage.whiten_patches:
        whiten(recipe, model)
    asked = list(itertools.islice(questions_from_shards(test_folder(options.root, arm.task)), options.questions))
    limits = {"min_pixels": options.pixels, "max_pixels": options.pixels, "max_new_tokens": 12, "batch_size": 150}

    def ask() -> dict[str, float]:
        with torch.autocast(module.device.type, torch.bfloat16):  # as in training; in less time
            found = evaluate(model, chat.tokenizer, asked, progress=None, **limits).accuracy
        return {kind: round(score, 4) for kind, score in found.items()}

    steps = steps_of(arm.llm, options)
    curve = Curve(ask, (steps // 2, steps, arm.steps) if arm.pairs == PAIRS[-1] else (steps,))
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
    arm.curve, arm.scores, arm.seconds = curve.points, curve.scores, round(time.process_time() - began, 1)
    arm.geometry = curve.geometry
    arm.blind = round(card_of(options.root, arm.task)["blind"], 4)


def steps_of(llm: str, options: argparse.Namespace) -> int:
    """Steps of the arms of a language model, those of new weights aside."""
    return setting.STEPS[llm] if options.steps is None else int(options.steps)
