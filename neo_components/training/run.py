"""One training run: a recipe in, a folder with the trained model out.

The folder holds ``recipe.yaml`` (the complete recipe), ``checkpoints/``, ``logs/`` (TensorBoard), ``pictures/`` and
``neo/`` (the model with tokenizer and image limits, ready for ``neo chat``, ``neo evaluate``, ``neo export`` and as the
start of the next stage).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch import Tensor

import neo_components
from neo_components.chat import Chat
from neo_components.data import load_tokenizer
from neo_components.data.module import NEODataModule
from neo_components.data.shard_folder import ShardFolder
from neo_components.evaluation import questions_from_shards
from neo_components.model import NEO
from neo_components.recipe import Recipe, build
from neo_components.training.callbacks import History, LineProgress, Predictions, averaging
from neo_components.training.checkpoints import SaveOnSigterm, WholeFiles, newest_checkpoint, read_checkpoint
from neo_components.training.module import NEOTraining
from neo_components.weights import read_json, write_text

PROVENANCE = "provenance.json"


@dataclass
class RunResult:
    """What a run made.

    Args:
        folder: the model's folder.
        model: the trained model.
        metrics: last value of everything that was logged.
        seconds: time of the training.
        losses: (step, seconds, training loss) of every step.
        scores: (step, seconds, exact match) of each validation that asked questions.
    """

    folder: Path
    model: NEO
    metrics: dict[str, float]
    seconds: float
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    scores: list[tuple[int, float, float]] = field(default_factory=list)


def train(recipe: Recipe, resume: str | Path | None = None) -> RunResult:
    """Runs a recipe.

    Args:
        recipe: from ``load_recipe``.
        resume: a checkpoint of an interrupted run of the same recipe, or ``last`` for its newest one.

    Raises:
        FileNotFoundError: if there is no checkpoint to resume from, or data is missing.
        SystemExit: with code 143 if SIGTERM came (``checkpoints.SaveOnSigterm``).
        ValueError: if parts of the recipe do not fit the model.
    """
    began = time.monotonic()
    output = Path(recipe.output)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    chat = _start(recipe)
    data = NEODataModule(**recipe.data)
    data.input_spec = chat.model.input_spec
    module = NEOTraining(chat.model, recipe.stage)
    history, predictions = History(), _predictions(recipe, chat)
    trainer = _trainer(recipe, [*_callbacks(recipe), history, *predictions])
    checkpoint = _checkpoint(output, resume, module)
    if recipe.stage.whiten_patches and checkpoint is None:
        whiten(recipe, chat.model)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "recipe.yaml", recipe.to_yaml())
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop  # Lightning's own exit looks like success to a scheduler
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    result = RunResult(output / "neo", chat.model, metrics, time.monotonic() - began, history.losses)
    result.scores = [score for callback in predictions for score in callback.scores]
    if trainer.is_global_zero:
        chat.save_pretrained(result.folder)
        _write_provenance(recipe, result)
    return result


def _start(recipe: Recipe) -> Chat:
    """The model that the stage starts from, with tokenizer and image limits."""
    data = recipe.data
    tokenizer = load_tokenizer(data["tokenizer"], data["chat_template"])
    return Chat(build(recipe.model), tokenizer, data["min_pixels"], data["max_pixels"])


def whiten(recipe: Recipe, model: NEO) -> None:
    """Whitens the patch embedding by the first training images; the same ones on every rank."""
    data = NEODataModule(**(recipe.data | {"workers": 0}))
    data.input_spec = model.input_spec
    data.setup()
    patches: list[Tensor] = []
    for batch in data.train_dataloader():
        patches.append(batch.patches)
        if sum(map(len, patches)) >= recipe.stage.whiten_patches:
            break
    embedding = model.patch_embedding
    embedding.whiten(torch.cat(patches)[: recipe.stage.whiten_patches].to(embedding.patch_proj.weight.device))


def _callbacks(recipe: Recipe) -> list[Callback]:
    """Checkpoints and progress."""
    stage = recipe.stage
    saving = ModelCheckpoint(
        Path(recipe.output) / "checkpoints",
        filename="step-{step:06d}",
        auto_insert_metric_name=False,
        every_n_train_steps=stage.checkpoint_every,
        save_top_k=2,
        monitor="step",
        mode="max",
        save_last=True,
        enable_version_counter=False,  # a second run into the folder must not leave the first one's last.ckpt in place
    )
    bar = RichProgressBar() if sys.stderr.isatty() else LineProgress(stage.name)
    averages = [averaging(stage.ema)] if stage.ema else []
    return [*averages, saving, SaveOnSigterm(Path(recipe.output) / "checkpoints"), bar]


def _predictions(recipe: Recipe, chat: Chat) -> list[Predictions]:
    """The callback that answers validation questions, if the stage asks any."""
    count, validation = recipe.stage.predictions, recipe.data["validation"]
    if not (count and validation and recipe.stage.validate_every):
        return []
    # Evenly spaced: the questions of one picture often lie side by side.
    step = max(1, len(ShardFolder(validation[0].shards)) // count)
    questions = list(islice(questions_from_shards(validation[0].shards), 0, step * count, step))
    return [Predictions(questions, chat, Path(recipe.output) / "pictures")]


def _trainer(recipe: Recipe, callbacks: list[Callback]) -> lightning.Trainer:
    try:
        return lightning.Trainer(**_trainer_options(recipe), callbacks=callbacks)
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}; change that key of the recipe or give trainer.KEY=VALUE") from error


def _trainer_options(recipe: Recipe) -> dict[str, Any]:
    """Lightning's arguments: what the stage says, and the recipe's own ``trainer`` section on top."""
    stage = recipe.stage
    validates = bool(stage.validate_every and recipe.data["validation"])
    options: dict[str, Any] = {
        "logger": TensorBoardLogger(recipe.output, name="logs", version=""),
        "max_steps": stage.steps,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": stage.log_every,
        "check_val_every_n_epoch": None,
        "val_check_interval": stage.validate_every if validates else None,
        "limit_val_batches": None if validates else 0,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stderr.isatty(),
        "use_distributed_sampler": False,
    }
    strategy = str(recipe.trainer.get("strategy", ""))
    if any(name in strategy for name in ("fsdp", "deepspeed", "model_parallel")):
        raise ValueError(
            f"trainer.strategy: {strategy} divides the weights between processes, which the export at the end of a run "
            "cannot put together yet; use ddp, or a model that fits one device"
        )
    return options | {"plugins": [WholeFiles()]} | recipe.trainer


def _checkpoint(output: Path, resume: str | Path | None, module: NEOTraining) -> Path | None:
    """The checkpoint to resume from; one that does not fit is refused before anything is written."""
    if resume is None:
        return None
    path = newest_checkpoint(output / "checkpoints") if str(resume) == "last" else Path(resume)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path} to resume from; start without --resume")
    saved = read_checkpoint(path)
    stored = {name: tensor.shape for name, tensor in saved["state_dict"].items()}
    done = int(saved["global_step"])
    if done >= module.stage.steps:
        raise ValueError(f"{path} has {done} steps already, stage.steps is {module.stage.steps}: raise it to go on")
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    differ = [name for name in sorted(stored.keys() | wanted) if stored.get(name) != wanted.get(name)]
    if differ:
        some = ", ".join(differ[:3])
        raise ValueError(
            f"{path} is of another model: {len(differ)} tensors differ ({some} ...); resume with the recipe of its run"
        )
    return path


def _write_provenance(recipe: Recipe, result: RunResult) -> None:
    """Adds this stage to the list of stages that made the model."""
    before = Path(recipe.model.from_pretrained or "") / PROVENANCE
    stages = read_json(before)["stages"] if recipe.model.from_pretrained and before.is_file() else []
    entry = {
        "stage": recipe.stage.name,
        "steps": recipe.stage.steps,
        "trained": recipe.stage.train,
        "data": [source.shards for source in recipe.data["train"]],
        "metrics": {name: round(value, 6) for name, value in result.metrics.items() if name.startswith("val/")},
        "seed": recipe.seed,
        "recipe": recipe.to_yaml(),
        "neo_components": neo_components.__version__,
    }
    write_text(result.folder / PROVENANCE, json.dumps({"stages": [*stages, entry]}, indent=2) + "\n")
