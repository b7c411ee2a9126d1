"""The commands ``neo recipes ...``: list, copy and validate recipes."""

from __future__ import annotations

import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from neo_components.recipe import Recipe

recipes_app = typer.Typer(help="List, copy and validate recipes.", invoke_without_command=True)

Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides of recipe keys: dotted.key=value ...")]
Imports = Annotated[
    list[str] | None, typer.Option("--import", help="Python module that registers your own parts; repeat for several.")
]


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes; copy or validate one."""
    if context.invoked_subcommand is None:
        from neo_components.recipe import list_recipes

        width = max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else sys.maxsize
        for name, _, what in list_recipes():
            typer.echo(textwrap.fill(what, width, initial_indent=f"{name:26s} ", subsequent_indent=" " * 27))


@recipes_app.command()
def copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    destination: Annotated[Path, typer.Argument(help="Output file or folder.")],
) -> None:
    """Copy a shipped recipe to a file of your own."""
    from neo_components.recipe import copy_recipe

    typer.echo(copy_recipe(name, destination))


@recipes_app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or name of a shipped recipe (see neo recipes).")],
    overrides: Overrides = None,
    imports: Imports = None,
) -> None:
    """Validate a recipe without loading weights, and report every fault."""
    from neo_components.recipe import load_recipe

    register(imports)
    loaded = load_recipe(recipe, overrides or [])
    if loaded.given_stage is not None:
        from neo_components.training.trainer import check_strategy

        check_strategy(loaded)
        _check_lora(loaded, overrides or [])
    typer.echo("valid")


def _check_lora(recipe: Recipe, overrides: list[str]) -> None:
    """Checks the targets of ``stage.lora`` against the language model; prints a note if its shape is unknown."""
    lora = recipe.stage.lora
    if lora is None:
        return
    from neo_components.inspection.shape import empty_model
    from neo_components.training.lora import check_targets

    try:
        model, _ = empty_model(recipe, overrides)
    except FileNotFoundError as error:
        typer.echo(f"note: stage.lora.targets are not checked: {error}", err=True)
    else:
        check_targets(model, lora)


def register(modules: list[str] | None) -> None:
    """Imports what ``--import`` names."""
    if modules:
        from neo_components.recipe import import_user_modules

        import_user_modules(modules)
