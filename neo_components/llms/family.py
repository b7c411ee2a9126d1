"""What a language model family has to say about itself, and how a config is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Config = dict[str, Any]
Sizes = dict[str, Any]
"""Keyword arguments of ``PostLLM``."""


@dataclass(frozen=True)
class Group:
    """Tensors of one block that lie otherwise in the family's files: several of ours in one stored, or the reverse.

    Args:
        ours: names inside a block of ``PostLLM``, in order.
        stored: ``stored(sizes)`` -> names inside a block of the files, in order.
        take: ``take(sizes, stored tensors)`` -> our tensors.
        write: the inverse, ``write(sizes, our tensors)`` -> stored tensors.
        optional: the files may also hold our own form, under our names.
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
    """Whether a stored tensor is a table of frequencies, which older files keep and the config says anyway."""
    return name.endswith("rotary_emb.inv_freq")


@dataclass(frozen=True)
class Family:
    """One family.

    Args:
        model_type: as in the config.
        sizes: ``sizes(config)`` -> keyword arguments of ``PostLLM``; raises ValueError, naming the setting, for what
            the family cannot do.
        rename: ``rename(name)``: a post-LLM weight's name -> its name in the family's files; several names if they
            differ from file to file, the one to write first. A block's own name, ``layers.0.``, is renamed too.
        groups: what no renaming can say.
        superfluous: ``superfluous(name)``: whether a stored tensor is no part of the language model.
    """

    model_type: str
    sizes: Callable[[Config], Sizes]
    rename: Callable[[str], str | tuple[str, ...]]
    groups: tuple[Group, ...] = ()
    superfluous: Callable[[str], bool] = is_rotary_table


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
        config: the config, with what the family's config class takes for what it leaves out.

    Raises:
        KeyError: naming a size that is not given.
    """
    said = {"num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False, **config}
    heads = said["num_attention_heads"]
    return {
        "vocab_size": said["vocab_size"],
        "depth": said["num_hidden_layers"],
        "hidden_size": said["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": said["num_key_value_heads"] or heads,
        "head_width": said["head_dim"] or said["hidden_size"] // heads,
        "feed_forward_size": said["intermediate_size"],
        "norm_eps": said.get("rms_norm_eps", 1e-6),
        "tie_embeddings": bool(said["tie_word_embeddings"]),
    }


def window_sizes(config: Config, layer_types: Sequence[str] | None, default: int | None) -> Sizes:
    """The window, and the blocks that have it.

    Args:
        config: the config.
        layer_types: ``full_attention`` or ``sliding_attention`` per block; ``None``: every block has the window.
        default: window if the config does not say; ``None``: none.

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
    """Rotary arguments, from either place where configs keep them.

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
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1, 1.0):
        found["rotary_width"] = int(sizes["head_width"] * share)
    if kind != "default":
        found["rope_scaling"] = _scaling(config, rope, kind)
    return found


def _scaling(config: Config, rope: Config, kind: str) -> dict[str, Any]:
    """A scaling with everything said that the config leaves to its defaults."""
    known = {*SCALING_NUMBERS[kind], "rope_type", "type", "rope_theta", "partial_rotary_factor", ORIGINAL}
    if unknown := {name for name, value in rope.items() if value is not None} - known:
        raise ValueError(f"rope scaling {kind!r} with {', '.join(sorted(unknown))} is not supported")
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {name: rope[name] for name in SCALING_NUMBERS[kind] if rope.get(name) is not None}
    context = config.get("max_position_embeddings")
    if kind == "dynamic":
        # transformers stretches from max_position_embeddings on, whatever else the config says.
        scaling[ORIGINAL] = context
    elif kind != "linear":
        # A number beside the rope settings (Phi-3) is stronger than one among them.
        scaling[ORIGINAL] = config.get(ORIGINAL) or rope.get(ORIGINAL) or context
        if kind in ("yarn", "longrope") and "factor" not in scaling and context and scaling[ORIGINAL]:
            scaling["factor"] = context / scaling[ORIGINAL]
    return scaling
