"""The commands that write a trained model, or a part of it, in another form: export, attach, convert."""

from __future__ import annotations

import shutil
from enum import StrEnum
from typing import Annotated

import typer

from neo_components.cli.models import Model, Out, model_folder, open_chat, stored_dtype
from neo_components.cli.recipes import Imports, register

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "generation_config.json", "preprocessor_config.json", "provenance.json",
)  # fmt: skip
"""Files beside the weights that are the same in all layouts."""


class Export(StrEnum):
    """What ``neo export`` writes."""

    pre_buffer = "pre-buffer"
    hf = "hf"
    hf_llm = "hf-llm"
    program = "program"


def export(
    model: Model,
    output: Out,
    to: Annotated[Export, typer.Option(help="What to write; see above.")] = Export.pre_buffer,
    license: Annotated[str, typer.Option(help="License of the weights, for the model card.")] = "",
    anchors: Annotated[
        int, typer.Option(help="pre-buffer: maximum number of word embeddings to keep for fitting bridges.")
    ] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="hf: default of max_new_tokens in its generation config.")] = 256,
    device: Annotated[
        str,
        typer.Option(
            help="Device to compute on, and the only one that a program runs on: cpu, cuda, cuda:N, mps, auto."
        ),
    ] = "cpu",
    dtype: Annotated[
        str,
        typer.Option(help="Type of the written weights: float32, bfloat16, float16, or auto (as they are saved)."),
    ] = "auto",
    imports: Imports = None,
) -> None:
    """Export a trained model, or a part of it, for use elsewhere.

    --to pre-buffer: the pre-Buffer with its patch embedding, to attach to another language model.

    --to hf: the whole model as a folder for transformers (trust_remote_code=True); this library is not needed.

    --to hf-llm: the language model alone, as an ordinary causal language model of transformers.

    --to program: the part before the language model, as torch.export programs.
    """
    register(imports)
    folder = model_folder(model)
    chat = open_chat(model, device, dtype, computes=to is Export.program)
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


def attach(
    pre_buffer: Annotated[
        str, typer.Argument(help="Pre-Buffer asset: pretrained:NAME (see neo pretrained list), folder or Hub id.")
    ],
    llm: Annotated[str, typer.Argument(help="Folder or Hub id of a language model.")],
    output: Out,
    bridge: Annotated[
        str, typer.Option(help="Bridge between the widths: auto, identity, least_squares, orthogonal or random.")
    ] = "auto",
    text: Annotated[
        str,
        typer.Option(help="Path of text tokens: shared (through the pre-Buffer), bypass (around it), or auto."),
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(help="Device to fit the bridges on: cpu, cuda, cuda:N, mps, or auto (cuda, else mps, else cpu)."),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the written weights: float32, bfloat16, float16, or auto (as the language model is saved)."
        ),
    ] = "float32",
    imports: Imports = None,
) -> None:
    """Attach a pre-Buffer to another language model. Train the result with a recipe."""
    from neo_components.components.pre_buffer import PreBuffer
    from neo_components.data import load_tokenizer
    from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
    from neo_components.devices import find_device
    from neo_components.model.attach import attach as join
    from neo_components.model.chat import Chat

    register(imports)
    where, written = find_device(device), stored_dtype(llm, dtype)
    part = PreBuffer.from_pretrained(pre_buffer, dtype=written)
    limits = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS} | part.info.image
    model = join(part, llm, bridge, dtype=written, text=text, device=where)
    typer.echo(Chat(model, load_tokenizer(llm), limits["min_pixels"], limits["max_pixels"]).save_pretrained(output))


def convert(
    model: Model,
    output: Out,
    layout: Annotated[str, typer.Option(help="Layout to write: neo_components or released.")] = "neo_components",
    imports: Imports = None,
) -> None:
    """Convert a model to another layout, with its tokenizer and image limits."""
    from neo_components.model.neo import NEO

    register(imports)
    folder = model_folder(model)
    NEO.from_pretrained(folder).save_pretrained(output, layout=layout)
    for name in COMPANIONS:
        if (folder / name).is_file() and folder.resolve() != output.resolve():
            shutil.copyfile(folder / name, output / name)
    typer.echo(output)
