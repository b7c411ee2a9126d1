"""The arguments of a block: declared once here, with type and default, and flat in every constructor that takes them.

Recipes, estimates, exports and language model families read them from the signatures that :func:`flat_arguments` makes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, Required, TypedDict, TypeVar, get_args, get_origin, get_type_hints

from neo_components.errors import nearest
from neo_components.registry import EXPERTS, MASKS, ROPES, Choice

Class = TypeVar("Class", bound=type)


class Default(NamedTuple):
    """The default of an argument, beside its type."""

    value: Any


class BlockArguments(TypedDict, total=False):
    """Arguments of :class:`~neo_components.components.primitive.NativePrimitive`.

    The defaults are NEO's, as on Qwen3. The arguments from ``rope_scaling`` on describe where other language
    models differ.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K, divides N.
        head_width: E, a multiple of 4.
        feed_forward_size: width of the gated feed-forward, or of each expert of a mixture of experts.
        norm_eps: of all norms.
        rope: registered name of the RoPE variant, or a mapping of ``kind`` and its options.
        base_t: base of the T frequencies.
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
        attention: registered name of the mask rule, or a mapping of ``kind`` and its options.
        experts: registered name of the expert routing by modality, or a mapping of ``kind`` and its options.
        rope_scaling: how the T frequencies are stretched, a mapping as in ``rope_scaling.py``; ``None``: not at all.
        rotary_width: how many of the T channels rotate; ``None``: all, 0: none. H and W always rotate.
        window: how many tokens back a token attends (``masks.rule_of``); ``None``: all.
        attention_scale: factor of the scores; ``None``: ``1/sqrt(E)``.
        qk_norm: norm of the T channels of queries and keys: ``head``, ``whole`` or ``none``.
        qkv_bias: whether the projections to T queries, T keys and values have a bias.
        output_bias: whether the attention's output projection has one.
        norm: form of the norms' gain, ``weight`` or ``one_plus_weight``; the H/W norms always have the first.
        norm_placement: ``before``, ``after`` or ``both``.
        residual_multiplier: factor of what attention and feed-forward add to x.
        activation: of the feed-forward, ``silu`` or ``gelu_tanh``.
        feed_forward_bias: whether the feed-forward's projections have a bias.
        num_experts: number of experts of a mixture of experts; ``None``: one dense feed-forward.
        experts_per_token: how many of them a token uses.
        normalize_experts: whether the chosen experts' weights sum to 1.
    """

    hidden_size: Required[int]
    num_heads: Required[int]
    num_kv_heads: Required[int]
    head_width: Required[int]
    feed_forward_size: Required[int]
    norm_eps: Annotated[float, Default(1e-6)]
    rope: Annotated[Choice, Default("native")]
    base_t: Annotated[float, Default(1e6)]
    base_h: Annotated[float, Default(1e4)]
    base_w: Annotated[float, Default(1e4)]
    attention: Annotated[Choice, Default("mixed")]
    experts: Annotated[Choice, Default("none")]
    rope_scaling: Annotated[Mapping[str, Any] | None, Default(None)]
    rotary_width: Annotated[int | None, Default(None)]
    window: Annotated[int | None, Default(None)]
    attention_scale: Annotated[float | None, Default(None)]
    qk_norm: Annotated[str, Default("head")]
    qkv_bias: Annotated[bool, Default(False)]
    output_bias: Annotated[bool, Default(False)]
    norm: Annotated[str, Default("weight")]
    norm_placement: Annotated[str, Default("before")]
    residual_multiplier: Annotated[float, Default(1.0)]
    activation: Annotated[str, Default("silu")]
    feed_forward_bias: Annotated[bool, Default(False)]
    num_experts: Annotated[int | None, Default(None)]
    experts_per_token: Annotated[int, Default(8)]
    normalize_experts: Annotated[bool, Default(True)]


def _parameters() -> dict[str, inspect.Parameter]:
    """The declaration above as keyword parameters."""
    found = {}
    for name, hint in get_type_hints(BlockArguments, include_extras=True).items():
        default: Any = inspect.Parameter.empty
        if get_origin(hint) is Annotated:
            hint, default = hint.__origin__, get_args(hint)[1].value
        elif get_origin(hint) is Required:
            (hint,) = get_args(hint)
        found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
    return found


PARAMETERS: dict[str, inspect.Parameter] = _parameters()
"""Name -> keyword parameter with type and default."""


def block_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The block's arguments among others, for example a stack's ``hparams``."""
    return {name: arguments[name] for name in PARAMETERS}


def complete_choices(arguments: Mapping[str, Any]) -> dict[str, Choice]:
    """The parts that a block's arguments choose by name, each with every option.

    Raises:
        ArgumentError: (a ``ValueError``) if a name or an option is unknown.
    """
    return {
        "rope": ROPES.complete(arguments["rope"]),
        "attention": MASKS.complete(arguments["attention"]),
        "experts": EXPERTS.complete(arguments["experts"]),
    }


def flat_arguments(cls: Class) -> Class:
    """Gives a class that takes ``**block: Unpack[BlockArguments]`` a flat constructor.

    Its signature and its docstring list every argument, missing ones take their defaults, and an unknown one is a
    TypeError that proposes the nearest. While the constructor runs, ``self.given`` holds all arguments, complete.
    """
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    own = [p for p in inspect.signature(init, eval_str=False).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(init, include_extras=True)
    own = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in own]
    first, last = ([p for p in own if (p.kind is p.KEYWORD_ONLY) is late] for late in (False, True))
    listed = [*first, *PARAMETERS.values(), *last]
    signature = inspect.Signature([p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in listed])

    @functools.wraps(init)
    def flat(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in signature.parameters:
                raise TypeError(f"{cls.__name__} has no argument {name!r}{nearest(name, signature.parameters)}")
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        object.__setattr__(self, "given", given)
        init(self, **given)
        object.__delattr__(self, "given")

    flat.__signature__ = signature  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in signature.parameters.values() if p.name != "self"}
    cls.__init__ = flat  # type: ignore[misc]
    described = inspect.cleandoc(BlockArguments.__doc__ or "").partition("Args:\n")[2]
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nArguments of the blocks:\n{described}"
    return cls
