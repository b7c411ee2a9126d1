"""For the reference: an argument that is declared as ``Annotated[TYPE, Default(VALUE)]`` is shown as TYPE = VALUE."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class FlatArguments(griffe.Extension):
    """Runs behind griffe's ``unpack_typeddict``, which lists the arguments of a block."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Splits the annotations of a signature, and those of its documented parameters."""
        for parameter in func.parameters:
            if found := _split(parameter.annotation):
                parameter.annotation, parameter.default = found
        for section in func.docstring.parsed if func.docstring else ():
            if section.kind is griffe.DocstringSectionKind.parameters:
                for parameter in section.value:
                    if found := _split(parameter.annotation):
                        parameter.annotation, parameter.default = found


def _split(annotation: Any) -> tuple[str, str] | None:
    """Type and default; ``None`` for any other annotation."""
    text = str(annotation)
    if not text.startswith("Annotated[") or "Default(" not in text:
        return None
    node = ast.parse(text, mode="eval").body
    assert isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple)
    kind, default = node.slice.elts
    assert isinstance(default, ast.Call)
    return ast.unparse(kind), ast.unparse(default.args[0])
