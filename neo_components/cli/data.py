"""The commands ``neo data ...``: make training data and look at it. Heavy modules load inside the commands.

Every registered converter is a command; its options are the fields of its class (``data/convert/base.py``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import lru_cache
from inspect import Parameter, Signature, getdoc
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperGroup

from neo_components.cli.recipes import Imports, register
from neo_components.data.limits import MAX_PIXELS, MIN_PIXELS
from neo_components.registry import CONVERTERS

IMPORT = "--import"


class ConverterGroup(TyperGroup):
    """The commands of this module, and one for each registered converter."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Imports the modules that ``--import`` names first, wherever it stands: they may register the command."""
        register([value for value in _values_of(IMPORT, args) if value])
        return super().parse_args(context, args)

    @property  # type: ignore[override]
    def commands(self) -> dict[str, Any]:
        """Converters first; their commands are made when they are first asked for."""
        return {name: converter_command(name, CONVERTERS[name]) for name in sorted(CONVERTERS)} | self._own

    @commands.setter
    def commands(self, own: dict[str, Any]) -> None:
        self._own = own


data_app = typer.Typer(cls=ConverterGroup, no_args_is_help=True, help="Make training data, and look at it.")

Out = Annotated[Path, typer.Option("--output", "-o", help="New folder of shards.")]
Size = Annotated[int, typer.Option(min=1, help="Records in one shard.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes; by default one for each core.")]
Tokenizer = Annotated[str, typer.Option(help="Folder or hub id of the tokenizer.")]
MinPixels = Annotated[int, typer.Option(help="Smallest area of an image after resizing, data.min_pixels.")]
MaxPixels = Annotated[int, typer.Option(help="Largest area of a single image, data.max_pixels.")]
MaxLength = Annotated[int | None, typer.Option(help="Longer samples are cut to so many tokens, data.max_length.")]
Factor = Annotated[int, typer.Option(help="Side of a visual token in pixels: patch_size times fold.")]


@data_app.callback()
def data(imports: Imports = None) -> None:
    """Make training data, and look at it."""


@lru_cache
def converter_command(name: str, part: Any) -> Any:
    """The command of a converter: its own options, and those that all converters share."""
    own = [_option_of(parameter, part) for parameter in CONVERTERS.options(name).values()]
    common = [_option("output", Out), _option("workers", Workers, None), _option("imports", Imports, None)]
    if not part.fixed_size:
        common.insert(1, _option("shard_size", Size, part.shard_size))

    def run(output: Path, workers: int | None, imports: Any, shard_size: int | None = None, **options: Any) -> None:
        from neo_components.data.convert.engine import convert_to_shards

        counts = convert_to_shards(
            part(**options), output, shard_size=shard_size, workers=_workers(workers), title=name
        )
        skipped = "".join(f", skipped ({reason}) {number}" for reason, number in sorted(counts.skipped.items()))
        typer.echo(f"read {counts.read}, written {counts.kept}{skipped}: {output}")

    return _command(name, run, [*own, *common], _summary_of(part))


def _command(name: str, run: Callable[..., None], options: list[Parameter], summary: str) -> Any:
    """A command of a function whose parameters are only known now."""
    run.__signature__ = Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    app = typer.Typer(add_completion=False)
    app.command(name, help=summary)(run)
    return typer.main.get_command(app)


def _option(name: str, annotation: Any, default: Any = Parameter.empty) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _option_of(parameter: Parameter, part: type) -> Parameter:
    """A converter's option as typer reads it; one without default is an argument."""
    annotated = get_origin(parameter.annotation) is Annotated
    kind, *metadata = get_args(parameter.annotation) if annotated else [parameter.annotation]
    if any(isinstance(one, typer.models.ParameterInfo) for one in metadata):
        return parameter.replace(kind=Parameter.KEYWORD_ONLY)
    text = next((one for one in metadata if isinstance(one, str)), _help_of(part).get(parameter.name, ""))
    required = parameter.default is Parameter.empty
    flag = [f"--{parameter.name.replace('_', '-')}"] if kind is bool and parameter.default is False else []
    info = typer.Argument(help=text) if required else typer.Option(*flag, help=text)
    return _option(parameter.name, Annotated[kind, info], parameter.default)


def _summary_of(part: type) -> str:
    """What stands before the sections of a docstring."""
    text = re.split(r"\n\s*(?:Args|Attributes|Raises):\n", getdoc(part) or "")[0].strip().replace("``", "")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _help_of(part: type) -> dict[str, str]:
    """The entries of a docstring's ``Args`` section."""
    found = re.search(r"^Args:\n((?: +.*\n?|\n)*)", getdoc(part) or "", re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", found[1] if found else "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _values_of(option: str, args: list[str]) -> list[str]:
    """The values of an option among arguments that are not parsed yet."""
    following = [value for name, value in pairwise(args) if name == option]
    return [*following, *(arg.partition("=")[2] for arg in args if arg.startswith(f"{option}="))]


@data_app.command("pretrain-mix")
def pretrain_mix(
    output: Annotated[Path, typer.Argument(help="Folder of the mix; holds a folder of shards for each part.")],
    packages: Annotated[Path, typer.Option(help="Folder of the packages with drawings, icons and fonts.")],
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the packages that are missing.")] = False,
    pairs: Annotated[int, typer.Option(min=1, help="Images of the train part, each with 1 to 4 questions.")] = 300_000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same shards.")] = 0,
    weight: Annotated[
        list[str] | None, typer.Option(help="Sampling weight of a source, icons=2; 0 leaves it out. Repeatable.")
    ] = None,
    held_out: Annotated[int, typer.Option(min=0, help="Images of each source that are held out.")] = 1_000,
    workers: Workers = None,
    imports: Imports = None,
) -> None:
    """Write the pretraining mix: images of many sources with questions, text alone, and what is held out."""
    from neo_components.data.convert.pretrain_parts import write_mix

    counts = write_mix(
        output, packages, pairs=pairs, held_out=held_out, seed=seed, weights=_weights(weight or []), fetch=fetch,
        workers=_workers(workers), report=typer.echo,
    )  # fmt: skip
    typer.echo(f"{counts} samples: {output} (README.md is its data card)")


def _weights(given: list[str]) -> dict[str, float]:
    """``["icons=2"]`` -> ``{"icons": 2.0}``."""
    weights = {}
    for text in given:
        name, equals, number = text.partition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ValueError(f"--weight must be SOURCE=NUMBER, like icons=2, got {text!r}")
    return weights


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
    counts = lengths.counts(2**31 - 1)
    typer.echo(f"usable {counts.kept} of {counts.read}, tokens {int(lengths.table[0].sum(dtype='int64'))}")
    if counts.skipped:
        typer.echo(f"unusable: {counts.summary()}")
    typer.echo(f"lengths-{fingerprint(folder, maker)[:20]}.npy")


@data_app.command()
def inspect(
    shards: Annotated[str, typer.Argument(help="Folder of shards.")],
    tokenizer: Tokenizer,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")] = Path("inspection"),
    seq_len: Annotated[int, typer.Option(help="Tokens of a packed sequence, data.seq_len.")] = 4096,
    min_pixels: MinPixels = MIN_PIXELS,
    max_pixels: MaxPixels = MAX_PIXELS,
    max_length: MaxLength = None,
    factor: Factor = 32,
    decode: Annotated[bool, typer.Option(help="Decode every image, to find truncated ones.")] = False,
    workers: Workers = None,
) -> None:
    """Report what is in a folder of shards and what training would skip, and draw ten of its samples."""
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
        title = f"{shards}: targets are green"
        typer.echo(draw_samples(found.shown, spec, lambda ids: str(tokens.decode(ids)), output / "samples.png", title))
    if len(found.lengths):
        typer.echo(draw_histograms(found.lengths, found.visual, found.sizes, output / "histograms.png", shards))


def _workers(given: int | None) -> int:
    return (os.cpu_count() or 1) if given is None else given
