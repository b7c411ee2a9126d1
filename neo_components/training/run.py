"""One training run: a recipe in, a folder with the trained model out.

The folder holds ``recipe.yaml`` (the complete recipe), ``checkpoints/``, ``logs/`` (TensorBoard and CSV), ``pictures/``
and ``neo/`` (the model with tokenizer and image limits, ready for ``neo chat``, ``neo evaluate``, ``neo export`` and as
the start of the next stage).
"""

from __future__ import annotations

import json
import signal
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
from lightning.pytorch.utilities.exceptions import SIGTERMException

import neo_components
from neo_components.data.module import NEODataModule
from neo_components.model.neo import NEO
from neo_components.recipe import Recipe
from neo_components.recipe.schema import PretrainedLLM
from neo_components.storage.weights import read_json, write_text
from neo_components.training.callbacks.drift import Drift
from neo_components.training.callbacks.performance import Performance
from neo_components.training.callbacks.perplexity import TextBefore
from neo_components.training.callbacks.progress import History
from neo_components.training.callbacks.summary import Summary
from neo_components.training.fsdp2.strategy import NAME, save_divided
from neo_components.training.lora import merge_lora
from neo_components.training.start import checkpoint_of, refuse_changes, start, whiten
from neo_components.training.trainer import build_trainer, predictions_of, strategy_of

PROVENANCE = "provenance.json"


@dataclass
class RunResult:
    """What a run made.

    Args:
        folder: the model's folder.
        model: the trained model; of one whose weights are divided, this process's rows.
        metrics: last value of everything that was logged.
        seconds: time of the training.
        losses: (step, seconds, training loss) of every step.
        scores: (step, seconds, exact match) of each validation that asked questions.
        summary: the figures of the run.
        first: whether this is the first of the run's processes, which speaks for all.
    """

    folder: Path
    model: NEO
    metrics: dict[str, float]
    seconds: float
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    summary: Summary = field(default_factory=Summary)
    first: bool = True


def train(recipe: Recipe, resume: str | Path | None = None) -> RunResult:
    """Runs a recipe.

    Args:
        recipe: from ``load_recipe``.
        resume: a checkpoint of an interrupted run of the same recipe, ``last`` for its newest one, or ``auto`` for its
            newest one if there is any: the same command then starts a run and restarts it.

    Raises:
        FileNotFoundError: if there is no checkpoint to resume from, or data is missing.
        SystemExit: with code 143 if a signal ended the run (``signals.SaveOnSignal``).
        ValueError: if parts of the recipe do not fit the model, or differ from what a checkpoint goes on with.
    """
    began = time.monotonic()
    output = Path(recipe.output)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    divided = strategy_of(recipe) == NAME
    chat, module = start(recipe)
    checkpoint, done = checkpoint_of(output, resume, module)
    if checkpoint is not None:
        refuse_changes(recipe, checkpoint)
    data = NEODataModule(**recipe.data)
    data.input_spec = chat.model.input_spec
    history, performance, predictions = History(), Performance(), predictions_of(recipe, chat)
    drift = Drift(recipe.stage.validate_every, recipe.stage.steps)
    # A part of a divided model cannot be asked by itself.
    before = TextBefore(data, not divided and isinstance(getattr(recipe.model, "post_llm", None), PretrainedLLM))
    watching = [history, performance, drift, *([before] if data.text_sources else [])]
    trainer = build_trainer(recipe, [*watching, *predictions], done)
    if recipe.stage.whiten_patches and checkpoint is None:
        whiten(recipe, chat.model)
    if trainer.is_global_zero:  # several processes may have been started at once
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "recipe.yaml", recipe.to_yaml())
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop  # Lightning's own exit looks like success to a scheduler
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} | drift.values
    merge_lora(chat.model)
    result = RunResult(output / "neo", chat.model, metrics, time.monotonic() - began, history.losses)
    result.summary = Summary(
        trainer.global_step, performance.tokens, performance.images, result.seconds, history.losses,
        history.validations, before.values, metrics,
    )  # fmt: skip
    result.first = trainer.is_global_zero
    result.scores = [score for callback in predictions for score in callback.scores]
    if divided:
        save_divided(chat, result.folder, trainer.is_global_zero)
    elif trainer.is_global_zero:
        chat.save_pretrained(result.folder)
    if trainer.is_global_zero:
        _write_provenance(recipe, result)
    return result


def _write_provenance(recipe: Recipe, result: RunResult) -> None:
    """Adds this stage to the list of stages that made the model."""
    before = Path(recipe.model.from_pretrained or "") / PROVENANCE
    stages = read_json(before)["stages"] if recipe.model.from_pretrained and before.is_file() else []
    entry = {
        "stage": recipe.stage.name,
        "steps": recipe.stage.steps,
        "trained": recipe.stage.train,
        "lora": asdict(recipe.stage.lora) if recipe.stage.lora else None,
        "data": [source.shards for source in recipe.data["train"]],
        "metrics": {name: round(value, 6) for name, value in result.metrics.items() if name.startswith("val/")},
        "seed": recipe.seed,
        "recipe": recipe.to_yaml(),
        "neo_components": neo_components.__version__,
    }
    write_text(result.folder / PROVENANCE, json.dumps({"stages": [*stages, entry]}, indent=2) + "\n")
