"""One training run: from a recipe to a folder with the trained model.

The folder contains ``recipe.yaml`` (the complete recipe), ``checkpoints/``, ``logs/`` (TensorBoard and CSV),
``figures/`` and ``neo/`` (the model with tokenizer and image limits, ready for ``neo chat``, ``neo evaluate``, ``neo
export`` and as the start of the next stage).
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
from neo_components.training.callbacks.perplexity import InitialTextPerplexity
from neo_components.training.callbacks.progress import History
from neo_components.training.callbacks.summary import Summary
from neo_components.training.callbacks.visual_geometry import VisualGeometry
from neo_components.training.fp8 import without_fp8
from neo_components.training.fsdp2.strategy import NAME, save_sharded
from neo_components.training.lora import merge_lora
from neo_components.training.start import checkpoint_of, refuse_changes, start, whiten
from neo_components.training.trainer import build_trainer, predictions_of, strategy_of

PROVENANCE = "provenance.json"


@dataclass
class RunResult:
    """The outcome of a run.

    Args:
        folder: of the trained model.
        model: the trained model; with sharded weights, this process's shards.
        metrics: last value of everything that was logged.
        seconds: duration of the training.
        losses: (step, seconds, training loss) of every step.
        scores: (step, seconds, mean score) of each validation with questions.
        summary: the numbers that ``neo train`` prints.
        first: whether this is the process of rank 0, which prints.
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
        resume: a checkpoint of an interrupted run of the same recipe, ``last`` for its newest checkpoint, or ``auto``
            for the newest checkpoint if there is one, so that one command both starts and restarts a run.

    Raises:
        FileNotFoundError: if there is no checkpoint to resume from, or data is missing.
        SystemExit: with code 143 after a signal (``signals.SaveOnSignal``).
        ValueError: if parts of the recipe do not fit the model or the checkpoint.
    """
    began = time.monotonic()
    output = Path(recipe.output)
    lightning.seed_everything(recipe.seed, workers=True, verbose=False)
    sharded = strategy_of(recipe) == NAME
    chat, module = start(recipe)
    checkpoint, done = checkpoint_of(output, resume, module)
    if checkpoint is not None:
        refuse_changes(recipe, checkpoint)
    data = NEODataModule(**recipe.data)
    data.input_spec = chat.model.input_spec
    history, performance, predictions = History(), Performance(), predictions_of(recipe, chat)
    drift = Drift(recipe.stage.validate_every, recipe.stage.steps)
    # The blocks of a sharded model cannot run in another model.
    before = InitialTextPerplexity(
        data, not sharded and isinstance(getattr(recipe.model, "post_llm", None), PretrainedLLM)
    )
    observers = [history, performance, drift, VisualGeometry(), *([before] if data.text_sources else [])]
    trainer = build_trainer(recipe, [*observers, *predictions], done)
    if recipe.stage.whiten_patches and checkpoint is None:
        whiten(recipe, chat.model)
    if trainer.is_global_zero:  # several processes may have started at once
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "recipe.yaml", recipe.to_yaml())
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop  # Lightning would exit with code 0, success to a scheduler
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} | drift.values
    merge_lora(chat.model)
    without_fp8(chat.model)
    result = RunResult(output / "neo", chat.model, metrics, time.monotonic() - began, history.losses)
    result.summary = Summary(
        trainer.global_step, performance.tokens, performance.images, result.seconds, history.losses,
        history.validations, before.values, metrics, recipe.stage.metric_name,
    )  # fmt: skip
    result.first = trainer.is_global_zero
    result.scores = [score for callback in predictions for score in callback.scores]
    if sharded:
        save_sharded(chat, result.folder, trainer.is_global_zero)
    elif trainer.is_global_zero:
        chat.save_pretrained(result.folder)
    if trainer.is_global_zero:
        _write_provenance(recipe, result)
    return result


def _write_provenance(recipe: Recipe, result: RunResult) -> None:
    """Adds this stage to the list of the model's stages."""
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
