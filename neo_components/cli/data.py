"""The commands ``neo data ...``: make training data and look at it. Heavy modules load inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS

if TYPE_CHECKING:
    from neo_components.data.skip_counts import SkipCounts

data_app = typer.Typer(no_args_is_help=True, help="Make training data, and look at it.")

Out = Annotated[Path, typer.Option("--output", "-o", help="New folder of shards.")]
Images = Annotated[Path | None, typer.Option(help="Folder that the names of images and videos are relative to.")]
Size = Annotated[int, typer.Option(min=1, help="Records in one shard.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; by default one for each core.")]
Prompt = Annotated[str, typer.Option(help="Text behind each image, for example a request to describe it.")]
Tokenizer = Annotated[str, typer.Option(help="Folder or hub id of the tokenizer.")]
MinPixels = Annotated[int, typer.Option(help="Smallest area of an image after resizing, data.min_pixels.")]
MaxPixels = Annotated[int, typer.Option(help="Largest area of a single image, data.max_pixels.")]
MaxLength = Annotated[int | None, typer.Option(help="Longer samples are cut to so many tokens, data.max_length.")]
Factor = Annotated[int, typer.Option(help="Side of a visual token in pixels: patch_size times fold.")]


@data_app.command()
def llava(
    conversations: Annotated[Path, typer.Argument(help="LLaVA-style JSON or JSONL file.")],
    output: Out,
    images: Images = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each video, evenly spaced.")] = 8,
    fps: Annotated[float | None, typer.Option(help="Frames per second of each video instead.")] = None,
    shard_size: Size = 10_000,
    workers: Workers = None,
) -> None:
    """Turn LLaVA-style conversations with images or videos into shards."""
    from neo_components.data.convert.llava import llava_to_shards

    tally = llava_to_shards(
        conversations, images, output, shard_size, workers=_workers(workers), frames=frames, fps=fps, title="llava"
    )
    _summary(tally, output)


@data_app.command()
def captions(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    output: Out,
    captions: Annotated[
        Path | None, typer.Option(help="File of captions, .csv, .jsonl or .txt; by default a.txt beside a.jpg.")
    ] = None,
    prompt: Prompt = "",
    shard_size: Size = 10_000,
    workers: Workers = None,
) -> None:
    """Turn a folder of images with captions into shards."""
    from neo_components.data.convert.captions import captions_to_shards

    tally = captions_to_shards(
        images, captions, output, shard_size, prompt=prompt, workers=_workers(workers), title="captions"
    )
    _summary(tally, output)


@data_app.command()
def vlmeval(
    table: Annotated[Path, typer.Argument(help="Benchmark in VLMEvalKit's TSV format.")],
    output: Out,
    shard_size: Size = 2_000,
    workers: Workers = None,
) -> None:
    """Turn a benchmark of VLMEvalKit into shards."""
    from neo_components.data.convert.vlmeval import vlmeval_to_shards

    _summary(vlmeval_to_shards(table, output, shard_size, workers=_workers(workers), title="vlmeval"), output)


@data_app.command()
def webdataset(
    tars: Annotated[Path, typer.Argument(help="Folder of image-text tars, as img2dataset writes them.")],
    output: Out,
    prompt: Prompt = "",
    workers: Workers = None,
) -> None:
    """Turn image-text tars (jpg with txt or json) into shards."""
    from neo_components.data.convert.web_tars import tars_to_shards

    _summary(tars_to_shards(tars, output, prompt=prompt, workers=_workers(workers), title="webdataset"), output)


@data_app.command()
def text(
    texts: Annotated[Path, typer.Argument(help="JSONL or Parquet file.")],
    output: Out,
    column: Annotated[str, typer.Option(help="Column of what is learnt.")] = "text",
    question: Annotated[str | None, typer.Option(help="Column of what is asked, if any.")] = None,
    shard_size: Size = 10_000,
    workers: Workers = None,
) -> None:
    """Turn texts, question-answer pairs or chat messages into shards."""
    from neo_components.data.convert.texts import texts_to_shards

    tally = texts_to_shards(
        texts, output, shard_size, text=column, question=question, workers=_workers(workers), title="text"
    )
    _summary(tally, output)


@data_app.command()
def index(
    shards: Annotated[str, typer.Argument(help="Folder of shards.")],
    tokenizer: Tokenizer,
    min_pixels: MinPixels = MIN_PIXELS,
    max_pixels: MaxPixels = MAX_PIXELS,
    max_length: MaxLength = None,
    factor: Factor = 32,
    workers: Workers = None,
) -> None:
    """Count the length of every sample ahead of training, which otherwise counts when it begins."""
    from neo_components.data import load_tokenizer
    from neo_components.data.plan.lengths import fingerprint, folder_lengths
    from neo_components.data.samples import SampleMaker, plain_spec
    from neo_components.data.shards.folder import open_folder

    tokens = load_tokenizer(tokenizer)
    folder = open_folder(shards)
    maker = SampleMaker(tokens, plain_spec(tokens, factor), min_pixels, max_pixels, max_length)
    lengths = folder_lengths(folder, maker, _workers(workers))
    tally = lengths.tally(2**31 - 1)
    typer.echo(f"usable {tally.kept} of {tally.read}, tokens {int(lengths.table[0].sum(dtype='int64'))}")
    if tally.skipped:
        typer.echo(f"unusable: {tally.summary()}")
    typer.echo(f"lengths-{fingerprint(folder, maker)[:20]}.npy")


@data_app.command()
def inspect(
    shards: Annotated[str, typer.Argument(help="Folder of shards.")],
    tokenizer: Tokenizer,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the pictures.")] = Path("inspection"),
    seq_len: Annotated[int, typer.Option(help="Tokens of a row, data.seq_len.")] = 4096,
    min_pixels: MinPixels = MIN_PIXELS,
    max_pixels: MaxPixels = MAX_PIXELS,
    max_length: MaxLength = None,
    factor: Factor = 32,
    decode: Annotated[bool, typer.Option(help="Decode every image, to find truncated ones.")] = False,
    workers: Workers = None,
) -> None:
    """Tell what is in a folder of shards and what training would skip, and draw ten of its samples."""
    from neo_components.data import load_tokenizer
    from neo_components.data.samples import plain_spec
    from neo_components.data.shards.inspection import inspect_folder
    from neo_components.viewers import draw_histograms, draw_samples

    tokens = load_tokenizer(tokenizer)
    spec = plain_spec(tokens, factor)
    found = inspect_folder(
        shards, tokens, spec, seq_len=seq_len, min_pixels=min_pixels, max_pixels=max_pixels,
        max_length=max_length, decode=decode, workers=_workers(workers),
    )  # fmt: skip
    for line in found.lines():
        typer.echo(line)
    if found.shown:
        title = f"{shards}: green is learnt"
        typer.echo(draw_samples(found.shown, spec, lambda ids: str(tokens.decode(ids)), output / "samples.png", title))
    if len(found.lengths):
        typer.echo(draw_histograms(found.lengths, found.visual, found.sizes, output / "histograms.png", shards))


@data_app.command()
def synth(
    output: Out,
    count: Annotated[int, typer.Option(min=1, help="Number of samples.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Same seed, same samples.")] = 0,
    kind: Annotated[
        list[str] | None, typer.Option(help="place, relation, nearest or count; repeat; all if none.")
    ] = None,
    captions: Annotated[bool, typer.Option("--captions", help="Descriptions instead of questions.")] = False,
) -> None:
    """Draw scenes of small shapes, with questions on place, relation, nearest and count, as shards."""
    from neo_components.data.convert.synth import KINDS, write_scenes

    index = write_scenes(output, count, seed, kind or KINDS, captions)
    typer.echo(f"written {len(index['samples'])}: {output}")


def _workers(given: int | None) -> int:
    return (os.cpu_count() or 1) if given is None else given


def _summary(tally: SkipCounts, output: Path) -> None:
    """The closing line of a conversion."""
    skipped = "".join(f", skipped ({reason}) {number}" for reason, number in sorted(tally.skipped.items()))
    typer.echo(f"read {tally.read}, written {tally.kept}{skipped}: {output}")
