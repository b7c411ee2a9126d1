"""The keys of a recipe: one dataclass per section, derived from the signatures of what the section builds.

A key that is added to a component is a key of the recipe at once; its type and default are those of the signature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeAlias, get_args, get_origin

import lightning

from neo_components.components.backends import BACKENDS
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.text_route import SHARED as SHARED_TEXT
from neo_components.components.text_route import TEXT
from neo_components.model.attach import AUTO
from neo_components.recipe.hints import (
    Names,
    arguments,
    default_of,
    hints_of,
    hints_of_arguments,
    members,
    required_arguments,
    sections_of,
)
from neo_components.recipe.parts import Part, keys_of, part_of, split_beside
from neo_components.registry import BRIDGES, EXPERTS, MASKS, PATCH_EMBEDDINGS, ROPES, Choice
from neo_components.storage.weights import DTYPES

FROM = "from_pretrained"
"""The key that tells the two forms of a section apart: read from a folder or hub repository, or built from sizes."""


MAY_BE_ZERO = ("depth", "init_std", "rotary_width")


def sizes_in_range(values: Mapping[str, Any]) -> dict[str, str]:
    """What is wrong with numbers of a component, by argument.

    All must be positive, but ids of tokens and the arguments of ``MAY_BE_ZERO`` may be 0.
    """
    found = {}
    for key, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            may_be_zero = key.endswith("_id") or key in MAY_BE_ZERO
            if value < 0 or (value == 0 and not may_be_zero):
                found[key] = f"got {value}, must be {'0 or more' if may_be_zero else 'positive'}"
    return found


CHOICES = {
    "rope": Part(
        ROPES,
        default=default_of(PostLLM, "rope"),
        # A pretrained language model brings its own base of the T frequencies.
        beside={"base_t": (float | None, None)} | {n: (float, default_of(PostLLM, n)) for n in ("base_h", "base_w")},
        problems=sizes_in_range,
    ),
    "attention": Part(MASKS, default=default_of(PostLLM, "attention")),
    "experts": Part(EXPERTS, default=default_of(PostLLM, "experts")),
}
"""Parts that the model section chooses for the blocks of pre-Buffer and post-LLM alike."""

SHARED = (*CHOICES, "backend", *(key for part in CHOICES.values() for key in part.beside))
"""Arguments of pre-Buffer and post-LLM that the model section gives to both."""

PATCH_EMBEDDING = Part(PATCH_EMBEDDINGS, default="neo")
BRIDGE = Part(BRIDGES, default=AUTO, also=(AUTO,))

Backend = Annotated[str, Names("attention backend", BACKENDS)]
Text = Annotated[str, Names("text", (*TEXT, AUTO))]
OtherText = Annotated[str, Names("text", TEXT)]
Dtype = Annotated[str, Names("dtype", DTYPES)]


TAKEN = ("norm_eps", *(name for name in required_arguments(PreBuffer) if name not in ("depth", "hidden_size")))
"""Arguments of a new pre-Buffer that are the post-LLM's where the recipe gives it none of its own."""

_CHECKED: dict[str, Any] = {"problems": staticmethod(sizes_in_range)}

if TYPE_CHECKING:
    NewPreBuffer: TypeAlias = Any
    NewPostLLM: TypeAlias = Any
else:
    NewPreBuffer = arguments(
        "NewPreBuffer",
        PreBuffer,
        omit=["hidden_size", *SHARED],
        replace={name: (hints_of_arguments(PreBuffer)[name] | None, None) for name in TAKEN},
        namespace=_CHECKED,
    )
    NewPostLLM = arguments("NewPostLLM", PostLLM, omit=SHARED, namespace=_CHECKED)


@dataclass(frozen=True, kw_only=True)
class PreBufferAsset:
    """A trained pre-Buffer with its patch embedding.

    Args:
        from_pretrained: ``pretrained:NAME`` of an asset that ships, or a folder or hub id.
        reset: give it random weights of the same shapes: the control arm of a comparison.
    """

    from_pretrained: str
    reset: bool = False


@dataclass(frozen=True, kw_only=True)
class PretrainedLLM:
    """A language model with its weights.

    Args:
        from_pretrained: folder or hub id, Hugging Face layout.
    """

    from_pretrained: str


@dataclass(frozen=True, kw_only=True)
class Compose:
    """A model from its parts.

    Args:
        patch_embedding: choice of the patch embedding; ``None`` if the pre-Buffer is an asset, which has its own.
        pre_buffer: sizes of a new one, or an asset.
        post_llm: a pretrained language model, or sizes of a new one.
        rope: choice of the RoPE variant, with the bases of its frequencies; ``None``: native, or that of the asset.
        attention: choice of the mask rule; ``None``: mixed, or that of the asset.
        experts: choice of the expert routing by modality; ``None``: none, or that of the asset.
        backend: how attention is computed.
        bridge: choice of how an asset is attached.
        text: path of text tokens, through the pre-Buffer or around it; auto: as :func:`~neo_components.attach` chooses
            for an asset, and through a new pre-Buffer.
        dtype: of all weights in memory.

    ``from_pretrained`` is ``None``: unlike a :class:`Checkpoint`, it was not trained as a whole.
    """

    patch_embedding: Annotated[Choice, PATCH_EMBEDDING] | None = None
    pre_buffer: NewPreBuffer | PreBufferAsset
    post_llm: NewPostLLM | PretrainedLLM
    rope: Annotated[Choice, CHOICES["rope"]] | None = None
    attention: Annotated[Choice, CHOICES["attention"]] | None = None
    experts: Annotated[Choice, CHOICES["experts"]] | None = None
    backend: Backend = "auto"
    bridge: Annotated[Choice, BRIDGE] = AUTO
    text: Text = AUTO
    dtype: Dtype = "float32"

    from_pretrained: ClassVar[None] = None

    @property
    def route(self) -> str:
        """Path of text through a new pre-Buffer, with ``auto`` resolved."""
        return SHARED_TEXT if self.text == AUTO else self.text


def block_choices(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the blocks that a model section chooses for pre-Buffer and post-LLM alike.

    Args:
        model: values of the section; one that is ``None`` or missing is left to the components.
    """
    found: dict[str, Any] = {}
    for name, part in CHOICES.items():
        if (choice := model.get(name)) is not None:
            found[name], beside = split_beside(choice, part.beside)
            found |= {key: value for key, value in beside.items() if value is not None}
    return found


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A NEO checkpoint to continue from.

    Args:
        from_pretrained: folder or hub id, own or released layout.
        backend: how attention is computed.
        dtype: of all weights in memory.
        text: the way of text tokens, through the pre-Buffer or around it; ``None``: as the model was saved.
    """

    from_pretrained: str
    backend: Backend = "auto"
    dtype: Dtype = "float32"
    text: OtherText | None = None


ModelRecipe = Compose | Checkpoint

TRAINER_OWNED = {
    "max_steps": "stage.steps decides",
    "max_epochs": "stage.steps decides",
    "val_check_interval": "stage.validate_every decides",
    "check_val_every_n_epoch": "stage.validate_every decides",
    "log_every_n_steps": "stage.log_every decides",
    "default_root_dir": "output decides",
    "enable_checkpointing": "stage.checkpoint_every decides",
    "callbacks": "the run brings its own",
    "logger": "the run brings its own",
}
"""Arguments of ``lightning.Trainer`` that a recipe may not give, and why."""


@lru_cache
def schema() -> Any:
    """The dataclass of a whole recipe file. Built on first use, as sections are in modules beside this one."""
    from neo_components.data.module import NEODataModule
    from neo_components.recipe.stage import StageConfig

    owned = {"seed": "the seed of the whole recipe is used"}
    data = arguments("DataRecipe", NEODataModule, omit=owned, namespace={"owned": owned})
    # Only what is given is passed on, so Lightning's defaults stay Lightning's.
    trainer = arguments(
        "TrainerRecipe",
        lightning.Trainer,
        omit=TRAINER_OWNED,
        namespace={"owned": TRAINER_OWNED, "finish": staticmethod(dict)},
    )
    return make_dataclass(
        "RecipeSchema",
        [
            ("seed", int, 0),
            ("output", str, ""),
            ("model", ModelRecipe),
            ("stage", StageConfig | None, None),
            ("data", data | None, None),
            ("trainer", trainer, field(default_factory=dict)),
            # Only read through ${variables.name}, so a resolved recipe has none.
            ("variables", dict[str, Any], field(default_factory=dict)),
        ],
        kw_only=True,
    )


def keys() -> tuple[str, ...]:
    """Every dotted key that a recipe may have, sections included; ``[]`` stands for the items of a list."""
    return tuple(dict.fromkeys(_keys(schema(), "")))


def _keys(section: Any, prefix: str) -> Iterator[str]:
    for name, hint in hints_of(section).items():
        yield prefix + name
        for inner in sections_of(hint):
            yield from _keys(inner, f"{prefix}{name}.")
        for part in filter(None, map(part_of, members(hint))):
            yield from (f"{prefix}{name}.{key}" for key in keys_of(part))
        for item in get_args(hint) if get_origin(hint) in (list, tuple, Sequence) else ():
            for inner in sections_of(item):
                yield from _keys(inner, f"{prefix}{name}[].")
