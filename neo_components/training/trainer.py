"""Lightning's Trainer of a run: strategy, loggers, checkpoints, progress and answers to validation questions."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from neo_components.data.shards.folder import ShardFolder
from neo_components.evaluation import questions_from_shards
from neo_components.model.chat import Chat
from neo_components.recipe import Recipe
from neo_components.training.callbacks.loggers import run_loggers
from neo_components.training.callbacks.progress import LineProgress, Predictions, averaging
from neo_components.training.callbacks.rng_state import RandomStates
from neo_components.training.callbacks.signals import SaveOnSignal, slurm_environment
from neo_components.training.checkpoints import AtomicCheckpointIO
from neo_components.training.context_parallel.model import check_processes
from neo_components.training.context_parallel.slices import check_length
from neo_components.training.fsdp2.average import ShardedAverage
from neo_components.training.fsdp2.strategy import NAME, FSDP2Strategy, policy_of, refuse_unshardable
from neo_components.training.placement import devices_of


def build_trainer(recipe: Recipe, callbacks: list[Callback], done: int) -> lightning.Trainer:
    """Lightning's Trainer of a run.

    Args:
        recipe: of the run.
        callbacks: observers; callbacks that save and show progress are added after them.
        done: steps of the checkpoint that the run resumes from.

    Raises:
        ValueError: if Lightning refuses an option.
    """
    try:
        return lightning.Trainer(**_options(recipe, done), callbacks=[*callbacks, *_callbacks(recipe)])
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}; change that key of the recipe or give trainer.KEY=VALUE") from error


def _callbacks(recipe: Recipe) -> list[Callback]:
    """Callbacks for random states, averaging, checkpoints, signals and progress."""
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
        enable_version_counter=False,  # or a second run would leave the first run's last.ckpt in place
    )
    bar = RichProgressBar(refresh_rate=stage.log_every) if sys.stderr.isatty() else LineProgress(stage.name)
    average = ShardedAverage if strategy_of(recipe) == NAME else averaging
    # After the predictions, as it restores the training weights at the end of a validation.
    averages = [average(stage.ema)] if stage.ema else []
    return [RandomStates(), *averages, saving, SaveOnSignal(Path(recipe.output) / "checkpoints"), bar]


def predictions_of(recipe: Recipe, chat: Chat) -> list[Predictions]:
    """The callback that answers validation questions, if the stage asks any."""
    count, validation = recipe.stage.predictions, recipe.data["validation"]
    if not (count and validation and recipe.stage.validate_every):
        return []
    # Evenly spaced, as the questions about one image are often adjacent.
    step = max(1, len(ShardFolder(validation[0].shards)) // count)
    questions = list(islice(questions_from_shards(validation[0].shards), 0, step * count, step))
    return [Predictions(questions, chat, Path(recipe.output) / "figures", recipe.stage.metric)]


def _options(recipe: Recipe, done: int) -> dict[str, Any]:
    """Lightning's arguments: from the stage, overridden by the recipe's ``trainer`` section."""
    stage = recipe.stage
    validates = bool(stage.validate_every and (recipe.data["validation"] or recipe.data["text_validation"]))
    options: dict[str, Any] = {
        "logger": run_loggers(Path(recipe.output), done),
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
    slurm = slurm_environment()
    options |= {"plugins": [AtomicCheckpointIO(), *([slurm] if slurm else [])]} | recipe.trainer
    if strategy_of(recipe) == NAME:
        options["strategy"] = FSDP2Strategy()
        options.pop("precision", None)  # the strategy's policy sets the types of gathered weights; no autocast
    return options


def check_strategy(recipe: Recipe) -> None:
    """Refuses settings that the recipe's strategy and number of processes do not support.

    Raises:
        ValueError: with the reason and the alternatives.
    """
    if strategy_of(recipe) == NAME:
        policy_of(recipe.trainer.get("precision", "32-true"))
        refuse_unshardable(recipe.stage)
    if (size := recipe.stage.context_parallel) > 1:
        check_processes(devices_of(recipe), size)
        check_length(recipe.data["seq_len"], size)


def strategy_of(recipe: Recipe) -> str:
    """The recipe's strategy.

    Raises:
        ValueError: if no model could be exported at the end.
    """
    strategy = str(recipe.trainer.get("strategy", "auto"))
    if strategy != NAME and any(name in strategy for name in ("fsdp", "deepspeed", "model_parallel")):
        raise ValueError(
            f"trainer.strategy: {strategy} shards the weights in a way that cannot be exported at the end of a run; "
            f"trainer.strategy={NAME} shards them and can be exported, ddp keeps full weights in every process"
        )
    return strategy
