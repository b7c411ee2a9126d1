"""The arguments of a block: declared once here, with type and default, and flat in every constructor that takes them.

Recipes, estimates, exports and language model families read them from the signatures that :func:`flat_arguments` makes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
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
    """

    hidden_size: Required[int]
    """D."""
    num_heads: Required[int]
    """N."""
    num_kv_heads: Required[int]
    """K, divides N."""
    head_width: Required[int]
    """E, a multiple of 4."""
    feed_forward_size: Required[int]
    """Width of the gated feed-forward, or of each expert of a mixture of experts."""
    norm_eps: Annotated[float, Default(1e-6)]
    """Of all norms."""
    rope: Annotated[Choice, Default("native")]
    """Registered name of the RoPE variant, or a mapping of ``kind`` and its options."""
    base_t: Annotated[float, Default(1e6)]
    """Base of the T frequencies."""
    base_h: Annotated[float, Default(1e4)]
    """Base of the H frequencies."""
    base_w: Annotated[float, Default(1e4)]
    """Base of the W frequencies."""
    attention: Annotated[Choice, Default("mixed")]
    """Registered name of the mask rule, or a mapping of ``kind`` and its options."""
    experts: Annotated[Choice, Default("none")]
    """Registered name of the expert routing by modality, or a mapping of ``kind`` and its options."""
    rope_scaling: Annotated[Mapping[str, Any] | None, Default(None)]
    """How the T frequencies are stretched, a mapping as in ``rope_scaling.py``; ``None``: not at all."""
    rotary_width: Annotated[int | None, Default(None)]
    """How many of the T channels rotate; ``None``: all, 0: none. H and W always rotate."""
    window: Annotated[int | None, Default(None)]
    """How many tokens back a token attends (``masks.rule_of``); ``None``: all."""
    attention_scale: Annotated[float | None, Default(None)]
    """Factor of the scores; ``None``: ``1/sqrt(E)``."""
    qk_norm: Annotated[str, Default("head")]
    """Norm of the T channels of queries and keys: ``head``, ``whole`` or ``none``."""
    qkv_bias: Annotated[bool, Default(False)]
    """Whether the projections to T queries, T keys and values have a bias."""
    output_bias: Annotated[bool, Default(False)]
    """Whether the attention's output projection has one."""
    norm: Annotated[str, Default("weight")]
    """Form of the norms' gain, ``weight`` or ``one_plus_weight``; the H/W norms always have the first."""
    norm_placement: Annotated[str, Default("before")]
    """``before``, ``after`` or ``both``."""
    residual_multiplier: Annotated[float, Default(1.0)]
    """Factor of what attention and feed-forward add to x."""
    activation: Annotated[str, Default("silu")]
    """Of the feed-forward, ``silu`` or ``gelu_tanh``."""
    feed_forward_bias: Annotated[bool, Default(False)]
    """Whether the feed-forward's projections have a bias."""
    num_experts: Annotated[int | None, Default(None)]
    """Number of experts of a mixture of experts; ``None``: one dense feed-forward."""
    experts_per_token: Annotated[int, Default(8)]
    """How many of them a token uses."""
    normalize_experts: Annotated[bool, Default(True)]
    """Whether the chosen experts' weights sum to 1."""


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
    described = "".join(f"\n    {name}: {text}" for name, text in _descriptions().items())
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nArguments of the blocks:{described}\n"
    return cls


@functools.cache
def _descriptions() -> dict[str, str]:
    """The text below each argument in the declaration."""
    (declaration,) = ast.parse(inspect.getsource(BlockArguments)).body
    assert isinstance(declaration, ast.ClassDef)
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for field, text in itertools.pairwise(declaration.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
