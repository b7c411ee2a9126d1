"""From a YAML file to a :class:`Recipe`: every key checked, every fault reported together, no weight loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from neo_components.components.post_llm import PostLLM
from neo_components.recipe.combinations import check_combinations
from neo_components.recipe.faults import Fault, RecipeError
from neo_components.recipe.files import merge, read_files, resolve
from neo_components.recipe.hints import default_of
from neo_components.recipe.reader import Reader
from neo_components.recipe.schema import (
    CHOICES,
    PATCH_EMBEDDING,
    Compose,
    ModelRecipe,
    PreBufferAsset,
    PretrainedLLM,
    schema,
)
from neo_components.recipe.shipped import find_recipe

if TYPE_CHECKING:
    from neo_components.recipe.stage import StageConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete, checked recipe.

    Args:
        model: :class:`Compose` or :class:`Checkpoint`.
        given_stage: see :attr:`stage`; ``None`` if the recipe only describes a model.
        given_data: see :attr:`data`; ``None`` if the recipe only describes a model.
        trainer: keyword arguments for ``lightning.Trainer``, those given.
        seed: of everything random in the run.
        output: folder of the run.
        path: the file that it was read from.
    """

    model: ModelRecipe
    given_stage: StageConfig | None = None
    given_data: Any = None
    trainer: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    output: str = "outputs"
    path: Path = field(default=Path("recipe.yaml"), compare=False)

    @property
    def stage(self) -> StageConfig:
        """What trains, for how long and how fast.

        Raises:
            RecipeError: if the recipe has no such section.
        """
        return self._needed("stage", self.given_stage)

    @property
    def data(self) -> dict[str, Any]:
        """All arguments of ``NEODataModule``, the recipe's seed among them.

        Raises:
            RecipeError: if the recipe has no such section.
        """
        section = self._needed("data", self.given_data)
        return {f.name: getattr(section, f.name) for f in fields(section)} | {"seed": self.seed}

    def _needed(self, name: str, section: Any) -> Any:
        if section is None:
            raise RecipeError([Fault(str(self.path), name, "a run needs this section, and the recipe has none")])
        return section

    def to_yaml(self) -> str:
        """The whole recipe with all defaults, which loads to the same recipe again."""
        sections = {
            "seed": self.seed,
            "output": self.output,
            "model": self.model,
            "stage": self.given_stage,
            "data": self.given_data,
            "trainer": self.trainer,
        }
        text = OmegaConf.to_yaml(OmegaConf.create(_plain(sections)))
        return f"# complete recipe, made from {self.path}\n{text}"


def _plain(value: Any) -> Any:
    """Mappings, lists and values only, as YAML holds them."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    # What is text here must not be taken for an interpolation when it is read again.
    return value.replace("${", "\\${") if isinstance(value, str) else value


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    Args:
        path: a YAML file, or the name of a recipe that ships (``neo recipes`` lists them).
        overrides: ``dotted.key=value``, the value as in YAML; they come after the file and what it extends.

    Raises:
        FileNotFoundError: if there is no such file.
        RecipeError: listing every fault with file, line, dotted key and what to do.
    """
    recipe, faults = _read(path, overrides)
    if recipe is None:
        raise RecipeError(faults)
    return recipe


def validate_recipe(path: str | Path, overrides: Sequence[str] = ()) -> list[Fault]:
    """All faults of a recipe, none if it is good; arguments as in :func:`load_recipe`.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        return _read(path, overrides)[1]
    except RecipeError as error:
        return error.faults


def _read(path: str | Path, overrides: Sequence[str]) -> tuple[Recipe | None, list[Fault]]:
    file = find_recipe(path)
    early: list[Fault] = []
    merged, origins = merge(read_files(file), overrides, early)
    values = resolve(merged, origins, early)
    reader = Reader(origins, {fault.key for fault in early})
    read = reader.section(values, [schema()], "")
    check_combinations(reader)
    faults = [*early, *reader.faults]
    if faults:
        return None, faults
    recipe = Recipe(
        seed=read.seed,
        output=read.output or f"outputs/{file.stem}",
        model=complete(read.model),
        given_stage=read.stage,
        given_data=read.data,
        trainer=read.trainer,
        path=file,
    )
    return recipe, []


def complete(model: ModelRecipe) -> ModelRecipe:
    """The model section with every default that is known without looking into an asset or a language model."""
    if not isinstance(model, Compose) or isinstance(model.pre_buffer, PreBufferAsset):
        return model
    parts = CHOICES | {"patch_embedding": PATCH_EMBEDDING}
    chosen: dict[str, Any] = {
        name: part.choice() if getattr(model, name) is None else getattr(model, name) for name, part in parts.items()
    }
    if chosen["rope"]["base_t"] is None and not isinstance(model.post_llm, PretrainedLLM):
        chosen["rope"] = {**chosen["rope"], "base_t": default_of(PostLLM, "base_t")}
    return replace(model, **chosen)
