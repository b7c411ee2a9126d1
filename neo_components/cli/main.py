"""The command line, ``neo ...``. Commands import heavy modules when they run, so that ``--help`` is fast."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from neo_components.cli.data import data_app
from neo_components.cli.models import Device, Dtype, Model, Out, open_chat, quiet
from neo_components.cli.pretrained import pretrained_app
from neo_components.cli.recipes import Imports, Overrides, recipes_app, register
from neo_components.cli.reuse import attach, convert, export

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compose, train, evaluate and reuse native vision-language models (NEO).",
    epilog="Start with: neo quickstart. Every command has --help. NEO_TRACEBACK=1 shows the traceback of an error.",
)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")
app.add_typer(pretrained_app, name="pretrained")


class Strategy(StrEnum):
    """How a model is placed on devices."""

    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"


@app.command()
def quickstart(
    output: Out = Path("outputs/quickstart"),
    scale: Annotated[
        float, typer.Option(help="Fraction of the training steps and test questions, for a trial run.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    device: Annotated[
        str,
        typer.Option(help="Device for all steps: cpu, cuda (the first GPU), cuda:N, or auto (cuda, else cpu)."),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision of the training: bfloat16 (mixed), float32, or auto (bfloat16 if the device has it)."
        ),
    ] = "auto",
) -> None:
    """Train a small model on real data, evaluate, export and reuse it, and write a report. A CPU is enough."""
    from neo_components.quickstart.main import run

    quiet()
    run(output, scale, seed, device, dtype)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a shipped recipe (see neo recipes).")],
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="Checkpoint to resume from, 'last', or 'auto' (last, if any).")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Run on this one device: cpu, cuda, cuda:N, or auto (cuda, else cpu). Default: the recipe's trainer."
        ),
    ] = None,
    imports: Imports = None,
) -> None:
    """Train a model as a recipe describes."""
    import torch.distributed

    from neo_components.recipe import load_recipe
    from neo_components.training.callbacks.summary import locations, table
    from neo_components.training.run import train as run

    register(imports)
    quiet()
    result = run(load_recipe(recipe, [*(overrides or []), *_on_device(device, overrides or [])]), resume)
    if result.first:
        typer.echo(table([*result.summary.rows(), *locations(result.folder.parent)]))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads can abort a process that ends with them


def _on_device(device: str | None, overrides: list[str]) -> list[str]:
    """Overrides of a recipe for ``--device``.

    Raises:
        ValueError: if the device is not there or cannot train, or an override gives another.
    """
    if device is None:
        return []
    from neo_components.devices import find_training_device, trainer_overrides

    keys = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes")
    if given := [override for override in overrides if override.partition("=")[0] in keys]:
        raise ValueError(f"--device {device} and {given[0]} both choose devices; leave one out")
    return trainer_overrides(find_training_device(device))


@app.command()
def evaluate(
    model: Model,
    shards: Annotated[Path, typer.Argument(help="Folder of shards with questions and answers.")],
    metric: Annotated[str, typer.Option(help="Registered name of the metric.")] = "exact_match",
    metric_option: Annotated[
        list[str] | None, typer.Option(help="Option of the metric, key=value; repeat for several.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first questions, at most this many.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for scores and answers.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer in tokens.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "auto",
    imports: Imports = None,
) -> None:
    """Ask a model every question of a folder by greedy generation and score the answers."""
    from itertools import islice

    from neo_components.evaluation import evaluate as run
    from neo_components.evaluation import questions_from_shards
    from neo_components.registry import METRICS

    register(imports)
    chosen = METRICS.complete({"kind": metric, **_options(metric_option or [])})
    if output and output.is_dir():
        raise ValueError(f"{output} is a folder; --output is the name of a JSON file")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    chat = open_chat(model, device, dtype)
    report = run(
        chat.model,
        chat.tokenizer,
        islice(questions_from_shards(shards), limit),
        metric=chosen,
        min_pixels=chat.min_pixels,
        max_pixels=chat.max_pixels,
        max_new_tokens=max_new_tokens,
    )
    for kind, value in report.accuracy.items():
        typer.echo(f"{kind:12s} {value:.4f}  of {report.counts[kind]}")
    if output:
        output.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _options(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs as a mapping; values are read as YAML, like those of a recipe.

    Raises:
        ValueError: if a pair has no ``=``.
    """
    from omegaconf import OmegaConf

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"--metric-option {pair!r}: must be key=value")
        found[key] = OmegaConf.from_dotlist([f"value={value}"]).value
    return found


@app.command()
def chat(
    model: Model,
    question: Annotated[str, typer.Argument(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="Image file; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of the answer in tokens.")] = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
    imports: Imports = None,
) -> None:
    """Ask a model a question about images or about text."""
    register(imports)
    typer.echo(open_chat(model, device, dtype).ask(question, image or [], max_new_tokens))


for command in (export, attach, convert):
    app.command()(command)


@app.command()
def inspect(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a shipped recipe (see neo recipes).")],
    overrides: Overrides = None,
    settings: Annotated[
        bool, typer.Option("--settings", help="Print the complete recipe first, with all defaults.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    strategy: Annotated[
        Strategy | None, typer.Option(help="How the model is placed on devices. Default: the recipe's.")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Total number of devices. Default: the recipe's.")] = None,
    device_memory: Annotated[
        float | None, typer.Option(min=0, help="Memory of one device in GB (10^9 bytes). Default: this machine's.")
    ] = None,
    image_tokens: Annotated[
        int | None, typer.Option(min=0, help="Visual tokens per document. Default: from the recipe's pixel limits.")
    ] = None,
    text_tokens: Annotated[
        int, typer.Option(min=1, help="Text tokens per document, half of them target tokens.")
    ] = 128,
    tflops: Annotated[
        float, typer.Option(min=1e-9, help="Peak TFLOP/s of a device; the default is an A100 in bfloat16.")
    ] = 312,
    mfu: Annotated[float, typer.Option(min=1e-9, max=1, help="Assumed model FLOPs utilization.")] = 0.4,
    imports: Imports = None,
) -> None:
    """Estimate what a run of a recipe costs, without loading weights.

    Prints parameters by group, FLOPs by part, memory per device and hours, and warns if the run does not fit.
    """
    from neo_components import inspection
    from neo_components.recipe import load_recipe

    register(imports)
    loaded = load_recipe(recipe, overrides or [])
    assumed = inspection.Assumed(
        image_tokens, text_tokens, strategy.value if strategy else None, devices, device_memory, tflops, mfu,
    )  # fmt: skip
    report = inspection.inspect_recipe(loaded, assumed, overrides or [])
    if settings and not as_json:
        typer.echo(loaded.to_yaml())
    typer.echo(inspection.as_json(report) if as_json else inspection.as_text(report))


def _message(error: Exception) -> str:
    """The text of an error; for an error in a data worker, without the worker's traceback."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return text
    return re.split(rf"^[\w.]*{type(error).__name__}: ", text, flags=re.MULTILINE)[-1].strip()


def main() -> None:
    """Entry point. A user's error is one message without a traceback; ``NEO_TRACEBACK=1`` shows the traceback."""
    # Waiting threads that spin for long take the cores that data workers need; threads that sleep at once wake too late
    # for the many short operations of a small model. libgomp reads this when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app(prog_name="neo")
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("NEO_TRACEBACK"):
            raise
        typer.echo(f"error: {_message(error)}", err=True)
        sys.exit(1)
