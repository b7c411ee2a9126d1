"""The command line, ``neo ...``. Heavy modules load inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import warnings
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from neo_components.cli.data import data_app
from neo_components.cli.recipes import Imports, Overrides, recipes_app, register

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compose, train, evaluate and reuse native vision-language models.",
)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")

Model = Annotated[str, typer.Argument(help="Model folder or hub id.")]
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "provenance.json",
)  # fmt: skip
"""Files beside the weights that are the same in every layout."""

Out = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Dtype = Annotated[str, typer.Option(help="Type of the weights in memory: float32, bfloat16 or float16.")]


class Export(StrEnum):
    """What ``neo export`` writes."""

    pre_buffer = "pre-buffer"
    hf = "hf"
    hf_llm = "hf-llm"
    program = "program"


class Strategy(StrEnum):
    """How devices share a model."""

    single = "single"
    ddp = "ddp"
    fsdp2 = "fsdp2"


@app.command()
def quickstart(
    output: Out = Path("outputs/quickstart"),
    scale: Annotated[float, typer.Option(help="Share of the steps and questions; below 1 only to try it out.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Train, evaluate, export and reuse a small model on real data, on a CPU, and write a report."""
    from neo_components.quickstart.main import run

    _quiet()
    run(output, scale, seed)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a shipped one.")],
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="A checkpoint, 'last', or 'auto': the last if any.")] = None,
    imports: Imports = None,
) -> None:
    """Train a recipe."""
    import torch.distributed

    from neo_components.recipe import load_recipe
    from neo_components.training.callbacks.summary import places, table
    from neo_components.training.run import train as run

    register(imports)
    _quiet()
    result = run(load_recipe(recipe, overrides or []), resume)
    if result.first:
        typer.echo(table([*result.summary.rows(), *places(result.folder.parent)]))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # gloo's threads can abort a process that ends with them


@app.command()
def evaluate(
    model: Model,
    shards: Annotated[Path, typer.Argument(help="Folder of shards with questions and answers.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Ask only the first so many questions.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for scores and answers.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 16,
    dtype: Dtype = "float32",
    imports: Imports = None,
) -> None:
    """Answer every question of a folder and score by exact match."""
    from itertools import islice

    from neo_components.evaluation import evaluate as run
    from neo_components.evaluation import questions_from_shards
    from neo_components.model.chat import Chat

    register(imports)
    if output and output.is_dir():
        raise ValueError(f"{output} is a folder; --output is the name of a JSON file")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
    chat = Chat.from_pretrained(_model_folder(model), dtype=dtype)
    report = run(
        chat.model,
        chat.tokenizer,
        islice(questions_from_shards(shards), limit),
        min_pixels=chat.min_pixels,
        max_pixels=chat.max_pixels,
        max_new_tokens=max_new_tokens,
    )
    for kind, value in report.accuracy.items():
        typer.echo(f"{kind:12s} {value:.4f}  of {report.counts[kind]}")
    if output:
        output.write_text(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@app.command()
def chat(
    model: Model,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    image: Annotated[list[Path] | None, typer.Option(help="Picture; repeat for several.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    dtype: Dtype = "float32",
    imports: Imports = None,
) -> None:
    """Ask a model a question about pictures."""
    from neo_components.model.chat import Chat

    register(imports)
    typer.echo(Chat.from_pretrained(_model_folder(model), dtype=dtype).ask(question, image or [], max_new_tokens))


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="Model folder or hub id, or the output folder of a run.")],
    output: Out,
    to: Annotated[Export, typer.Option(help="What to write, see above.")] = Export.pre_buffer,
    license: Annotated[str, typer.Option(help="Licence of the weights, for the model card.")] = "",
    anchors: Annotated[int, typer.Option(help="pre-buffer: most word embeddings to keep for bridges.")] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="hf: longest answer where its user does not say.")] = 256,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as stored if not given.")] = None,
    imports: Imports = None,
) -> None:
    """Take a trained model, or a part of it, elsewhere.

    --to pre-buffer: the pre-Buffer with its patch embedding, to attach to another language model.

    --to hf: the whole model as a folder that transformers loads by itself, with trust_remote_code=True.

    --to hf-llm: its language model alone, as an ordinary causal language model of transformers, for text.

    --to program: what lies before its language model, as programs that torch loads alone.
    """
    from neo_components.model.chat import Chat
    from neo_components.storage.weights import TensorFiles

    register(imports)
    folder = _model_folder(model)
    chat = Chat.from_pretrained(folder, dtype=dtype or TensorFiles(folder).dtype())
    if to is Export.pre_buffer:
        from neo_components.components.pre_buffer import AssetInfo
        from neo_components.model.attach import export_pre_buffer, provenance_of

        info = AssetInfo(chat.image_config(), provenance_of(folder), license)
        typer.echo(export_pre_buffer(chat.model, output, folder, anchors, info))
    elif to is Export.hf:
        from neo_components.export.hf.folder import write_hf

        limits = chat.min_pixels, chat.max_pixels
        typer.echo(write_hf(chat.model, chat.tokenizer, output, *limits, max_new_tokens, license))
    elif to is Export.program:
        from neo_components.export.torch_export import write_programs

        typer.echo(write_programs(chat.model, output, chat.image_config()))
    else:
        from neo_components.export.hf.language_model import what_is_lost, write_language_model

        typer.echo(write_language_model(chat.model.post_llm, chat.tokenizer, output, license))
        for sentence in what_is_lost(chat.model.post_llm):
            typer.echo(sentence, err=True)


def _model_folder(model: str) -> Path:
    """The folder of a model; of a run's output folder the model in it."""
    from neo_components.storage.hub import resolve
    from neo_components.storage.weights import CONFIG

    folder = resolve(model)
    return folder / "neo" if not (folder / CONFIG).is_file() and (folder / "neo" / CONFIG).is_file() else folder


@app.command()
def attach(
    pre_buffer: Annotated[str, typer.Argument(help="Asset folder or hub id.")],
    llm: Annotated[str, typer.Argument(help="Language model folder or hub id.")],
    output: Out,
    bridge: Annotated[str, typer.Option(help="auto, identity, least_squares, orthogonal or random.")] = "auto",
    text: Annotated[str, typer.Option(help="Words: shared, through the pre-Buffer, or bypass, around it.")] = "shared",
    imports: Imports = None,
) -> None:
    """Attach a pre-Buffer to another language model; the result is tuned with a recipe."""
    from neo_components.components.pre_buffer import PreBuffer
    from neo_components.data import load_tokenizer
    from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
    from neo_components.model.attach import attach as join
    from neo_components.model.chat import Chat

    register(imports)
    part = PreBuffer.from_pretrained(pre_buffer)
    limits = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS} | part.info.image
    chat = Chat(join(part, llm, bridge, text=text), load_tokenizer(llm), limits["min_pixels"], limits["max_pixels"])
    typer.echo(chat.save_pretrained(output))


@app.command()
def convert(
    model: Model,
    output: Out,
    layout: Annotated[str, typer.Option(help="neo_components or released.")] = "neo_components",
    imports: Imports = None,
) -> None:
    """Rewrite a model in another layout; its tokenizer and image limits go along."""
    from neo_components.model.neo import NEO

    register(imports)
    folder = _model_folder(model)
    NEO.from_pretrained(folder).save_pretrained(output, layout=layout)
    for name in COMPANIONS:
        if (folder / name).is_file() and folder.resolve() != output.resolve():
            shutil.copyfile(folder / name, output / name)
    typer.echo(output)


@app.command()
def inspect(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a shipped one.")],
    overrides: Overrides = None,
    settings: Annotated[bool, typer.Option("--settings", help="Print the complete recipe first.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    strategy: Annotated[Strategy | None, typer.Option(help="How devices share the model; else the recipe's.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="All devices; else the recipe's.")] = None,
    device_memory: Annotated[float | None, typer.Option(min=0, help="GB of a device; else what is found.")] = None,
    image_tokens: Annotated[int | None, typer.Option(min=0, help="Visual tokens of a document.")] = None,
    text_tokens: Annotated[int, typer.Option(min=1, help="Other tokens of a document, half of them learnt.")] = 128,
    tflops: Annotated[float, typer.Option(min=1e-9, help="Peak of a device, 10^12 FLOPs a second; an A100's.")] = 312,
    mfu: Annotated[float, typer.Option(min=1e-9, max=1, help="Share of the peak that a run reaches.")] = 0.4,
    imports: Imports = None,
) -> None:
    """Tell what a recipe's run needs, without loading a weight.

    Parameters by group, FLOPs by part, memory of a device by kind, hours; a warning if it will not fit.
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


def _quiet() -> None:
    """Silences Lightning's notes on devices that are not there and its advertisements; call after importing it."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")  # Lightning's own, no user can mend it


def _message(error: Exception) -> str:
    """An error's text; of one from a data worker only its own words, without the worker's traceback."""
    text = str(error)
    if "in DataLoader worker process" not in text:
        return text
    return re.split(rf"^[\w.]*{type(error).__name__}: ", text, flags=re.MULTILINE)[-1].strip()


def main() -> None:
    """Entry point: a user's error is one message, not a traceback; ``NEO_TRACEBACK=1`` shows where it came from."""
    # Threads that spin for long while they wait take the cores that data workers need; threads that fall asleep at once
    # wake too late for the many short operations of a small model. libgomp reads this when torch is loaded.
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
