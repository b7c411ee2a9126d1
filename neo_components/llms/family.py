"""Base class of language model families, and helpers that read a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

Config = dict[str, Any]
Sizes = dict[str, Any]
"""Keyword arguments of ``PostLLM``."""


@dataclass(frozen=True)
class Group:
    """Tensors of one block that the family's files join or split: several of ours in one stored, or the reverse.

    Args:
        ours: names inside a block of ``PostLLM``, in order.
        stored: ``stored(sizes)`` -> names inside a block of the files, in order.
        take: ``take(sizes, stored tensors)`` -> our tensors.
        write: the inverse, ``write(sizes, our tensors)`` -> stored tensors.
        optional: the files may also hold the form of ``PostLLM``, under its names.
    """

    ours: tuple[str, ...]
    stored: Callable[[Sizes], Sequence[str]]
    take: Callable[[Sizes, list[Tensor]], list[Tensor]]
    write: Callable[[Sizes, list[Tensor]], list[Tensor]]
    optional: bool = False

    def read(self, sizes: Sizes, stored: list[Tensor]) -> list[Tensor]:
        """Our tensors from the stored ones.

        Raises:
            ValueError: if their shapes are not those of a block of these sizes.
        """
        try:
            return self.take(sizes, stored)
        except RuntimeError as error:
            names = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(self.stored(sizes), stored, strict=True))
            raise ValueError(f"misshapen: a block has {names}, which do not fit its config's sizes") from error


def is_rotary_table(name: str) -> bool:
    """Whether a stored tensor is a table of rotary frequencies, which older files keep beside the config."""
    return name.endswith("rotary_emb.inv_freq")


class Family:
    """How one family of language models is read. A subclass has what differs, and is registered by ``model_type``::

        @LLM_FAMILIES.register("my_llm")
        class MyLLM(Family):
            def sizes(self, config): ...

    It holds no state: whoever needs it makes one.

    Attributes:
        defaults: what the family's config class takes for settings that a config leaves out.
        supported: values of settings that are computed exactly; every other value is refused by name.
        groups: tensors that are joined or split in the files, which no renaming can express.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}
    supported: ClassVar[Mapping[str, Sequence[Any]]] = {"hidden_act": ("silu",)}
    groups: ClassVar[tuple[Group, ...]] = ()

    def sizes(self, config: Config) -> Sizes:
        """Keyword arguments of ``PostLLM``.

        Args:
            config: the config, with :attr:`defaults` for what it leaves out; its settings are supported ones.

        Raises:
            KeyError: naming a size that is not given.
            ValueError: naming a setting that the family cannot compute.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sizes(config)")

    def rename(self, name: str) -> str | tuple[str, ...]:
        """A post-LLM weight's name -> its name in the family's files.

        Several names if they differ from file to file, the one to write first. A block's own name, ``layers.0.``, is
        renamed too.
        """
        return in_model(name)

    def superfluous(self, name: str) -> bool:
        """Whether a stored tensor is no part of the language model."""
        return is_rotary_table(name)

    def transformers_configs(self, config: Config) -> Iterator[Config]:
        """Configs under which transformers may compute the same language model, the likeliest first.

        An export takes the first that describes exactly this model, so a config too many does no harm.
        """
        yield config
        yield config | {"model_type": "llama"}

    def arguments(self, config: Config) -> Sizes:
        """:meth:`sizes` of a config as it stands in a file: defaults are put in, unsupported settings refused.

        Raises:
            KeyError: naming a size that is not given.
            ValueError: naming each setting that is not supported.
        """
        config = {**self.defaults, **config}
        require(config, self.supported)
        return self.sizes(config)


def in_model(name: str) -> str:
    """The renaming of most families: ours, with ``model.`` in front of all but the head."""
    if name == "lm_head.weight":
        return name
    return "model." + name.replace("word_embedding.", "embed_tokens.", 1)


def require(config: Config, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Refuses settings that would be computed wrongly.

    Raises:
        ValueError: naming each setting, its value and what is allowed.
    """
    faults = [
        f"{name}={config[name]!r} (supported: {' or '.join(map(repr, values))})"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if faults:
        raise ValueError(f"this {config.get('model_type')} config is not supported: {'; '.join(faults)}")


def block_sizes(config: Config) -> Sizes:
    """The arguments that every family has, under the names that most configs use.

    Args:
        config: the config, with the family's defaults.

    Raises:
        KeyError: naming a size that is not given.
    """
    given = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, **config}
    heads = given["num_attention_heads"]
    return {
        "vocab_size": given["vocab_size"],
        "depth": given["num_hidden_layers"],
        "hidden_size": given["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": given["num_key_value_heads"] or heads,
        "head_width": given["head_dim"] or given["hidden_size"] // heads,
        "feed_forward_size": given["intermediate_size"],
        "norm_eps": given.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(given["tie_word_embeddings"]),
    }


def window_sizes(config: Config, layer_types: Sequence[str] | None, default: int | None) -> Sizes:
    """The window, and the blocks that have it.

    Args:
        config: the config.
        layer_types: ``full_attention`` or ``sliding_attention`` per block; ``None``: every block has the window.
        default: window if the config gives none; ``None``: no window.

    Raises:
        ValueError: if a type is neither, their number is not that of the blocks, or there is no window for them.
    """
    window, depth = config.get("sliding_window", default), config["num_hidden_layers"]
    if layer_types is None:
        return {"window": window}
    kinds = {"full_attention", "sliding_attention"}
    if unknown := set(layer_types) - kinds:
        raise ValueError(f"layer_types has {', '.join(sorted(unknown))} (supported: {' or '.join(sorted(kinds))})")
    if len(layer_types) != depth:
        raise ValueError(f"layer_types has {len(layer_types)} entries for num_hidden_layers={depth}")
    sliding = [number for number, kind in enumerate(layer_types) if kind == "sliding_attention"]
    if not sliding:
        return {}
    if window is None:
        raise ValueError("layer_types has sliding_attention, but the config gives no sliding_window")
    return {"window": window} if len(sliding) == depth else {"window": window, "window_layers": sliding}


ORIGINAL = "original_max_position_embeddings"

SCALING_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
}
"""By type of scaling: the numbers that a config gives beside the original context."""


def rope_sizes(
    config: Config, sizes: Sizes, default_base: float = 1e4, kinds: Sequence[str] = tuple(SCALING_NUMBERS)
) -> Sizes:
    """RoPE arguments, from ``rope_scaling``, ``rope_parameters`` or the config itself.

    Args:
        config: the config.
        sizes: of :func:`block_sizes`.
        default_base: base if the config gives none.
        kinds: types of scaling that the family has.

    Raises:
        ValueError: if the scaling is not supported, naming it.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in kinds:
        raise ValueError(f"rope scaling {kind!r} is not supported (supported: {', '.join(kinds)})")
    base = rope.get("rope_theta", config.get("rope_theta"))
    found: Sizes = {"base_t": float(default_base if base is None else base)}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        found["rotary_width"] = int(sizes["head_width"] * partial)
    if kind != "default":
        found["rope_scaling"] = _scaling(config, rope, kind)
    return found


def _scaling(config: Config, rope: Config, kind: str) -> dict[str, Any]:
    """The scaling, with its defaults for what the config leaves out."""
    known = {*SCALING_NUMBERS[kind], "rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL}
    if unknown := {name for name, value in rope.items() if value is not None} - known:
        raise ValueError(f"rope scaling {kind!r} with {', '.join(sorted(unknown))} is not supported")
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {name: rope[name] for name in SCALING_NUMBERS[kind] if rope.get(name) is not None}
    context = config.get("max_position_embeddings")
    if kind == "dynamic":
        # transformers stretches from max_position_embeddings on, whatever else is in the config.
        scaling[ORIGINAL] = context
    elif kind != "linear":
        # A number beside the rope settings (Phi-3) is stronger than one among them.
        scaling[ORIGINAL] = config.get(ORIGINAL) or rope.get(ORIGINAL) or context
        if kind in ("yarn", "longrope") and "factor" not in scaling and context and scaling[ORIGINAL]:
            scaling["factor"] = context / scaling[ORIGINAL]
    return scaling
