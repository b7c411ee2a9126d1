"""What one run of ``neo pretrained make`` is given, and the record of it in the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from neo_components.devices import trainer_overrides
from neo_components.recipe import Recipe, load_recipe
from neo_components.recipe.shipped import recipe_folder
from neo_components.storage.weights import read_json, write_text

JOB = "job.json"
"""Minutes and recipes that the parts are trained with."""
PLAN = "plan.json"
ASSET = "pre_buffer"
MIX, LARGE, SMALL = "mix", "smollm2", "small_llm"
GPU_WORKERS = 8
SHOWN = 3
"""Most differences that an error names."""


@dataclass(frozen=True)
class Making:
    """The arguments of :func:`neo_components.pretrained.make.make`, resolved.

    Args:
        out: folder of everything.
        packages: folder of the packages.
        fetch: download packages that are missing.
        pairs: images of the mix; ``None``: as many as the mix was begun with.
        minutes: of the training of all parts; ``None``: as many steps as the recipes have.
        recipes: folder of the recipes, or the name of a folder of recipes that ship.
        device: of all steps.
        precision: Lightning's, of the training.
        overrides: of all recipes.
        report: takes a line of progress.
    """

    out: Path
    packages: Path
    fetch: bool
    pairs: int | None
    minutes: float | None
    recipes: str
    device: torch.device
    precision: str
    overrides: tuple[str, ...]
    report: Callable[[str], None]

    @property
    def parts(self) -> list[str]:
        """Names of the recipes, in order."""
        folder = Path(self.recipes) if Path(self.recipes).is_dir() else recipe_folder() / self.recipes
        names = sorted(file.stem for file in folder.glob("*.yaml"))
        if not names:
            raise FileNotFoundError(f"{folder} has no recipes; give a folder with one file for each part")
        return names

    def recipe(self, name: str, *more: str) -> Recipe:
        """The recipe of a part, on this device, with its folders in ``out``."""
        changes = [f"variables.root={self.out}", f"trainer.precision={self.precision}", *trainer_overrides(self.device)]
        if self.device.type != "cpu":
            changes.append(f"data.workers={max(1, min(GPU_WORKERS, (os.cpu_count() or 1) - 1))}")
        return load_recipe(f"{self.recipes}/{name}.yaml", [*changes, *self.overrides, *more])

    def keep(self) -> None:
        """Writes ``job.json`` at the first start; later starts must have the same minutes, recipes and overrides.

        The device and the folder's path are not part of it: a prepared folder may go on elsewhere.

        Raises:
            FileExistsError: if they differ.
        """
        wanted = {"minutes": self.minutes} | {f"{name}.{key}": v for name in self.parts for key, v in self._asked(name)}
        path = self.out / JOB
        if not path.is_file():
            write_text(path, json.dumps(wanted, indent=1) + "\n")
            return
        known = read_json(path)
        differ = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if differ:
            first = [f"{name} is {wanted.get(name)}, and was {known.get(name)}" for name in differ[:SHOWN]]
            more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
            parts = sorted({name.partition(".")[0] for name in known if "." in name})
            raise FileExistsError(
                f"{self.out} was begun with other arguments: {'; '.join(first)}{more}. Start it with those again, "
                f"write to another folder, or remove {', '.join([*parts, ASSET, PLAN, JOB])} in {self.out} to train "
                "again on the mix and the language models that are there"
            )

    def _asked(self, name: str) -> list[tuple[str, Any]]:
        """Dotted keys and values of a part's recipe with the user's overrides, without those of the device."""
        text = load_recipe(f"{self.recipes}/{name}.yaml", self.overrides).to_yaml()
        return list(_flat(OmegaConf.to_container(OmegaConf.create(text), resolve=True)))


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        return [(prefix, value)]
    return [found for key, inner in value.items() for found in _flat(inner, f"{prefix}.{key}" if prefix else str(key))]
