"""The commands ``neo pretrained ...``: the pre-Buffer assets that ship with the library."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

pretrained_app = typer.Typer(help="List the pre-Buffer assets that ship; add one.", no_args_is_help=True)


@pretrained_app.command("list")
def list_command() -> None:
    """List the assets that ship, by the names that attach, neo attach and recipes take."""
    from neo_components.storage.hub import PREFIX
    from neo_components.storage.pretrained import list_pretrained

    width = max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else sys.maxsize
    for name, asset in list_pretrained().items():
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
) -> None:
    """Add an exported pre-Buffer to the assets that ship: in float16, with checksums in the index."""
    from neo_components.pretrained.ship import ship

    entry = ship(asset, name, description, assets, hub)
    typer.echo(f"pretrained:{name}: {entry.bytes / 1e6:.1f} MB, trained for {entry.trained_on}")
