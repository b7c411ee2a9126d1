"""Lets the reference pages show ``:class:`Sample``` as a link, as other documentation tools do."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Turns the roles of all docstrings into links; a name without an entry of its own stays plain code."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        self._walk(pkg)

    def _walk(self, item: griffe.Object) -> None:
        if item.docstring:
            item.docstring.value = ROLE.sub(lambda role: _link(item, role[1]), item.docstring.value)
        for member in item.members.values():
            if isinstance(member, griffe.Object):
                self._walk(member)


def _link(item: griffe.Object, name: str) -> str:
    try:
        path = item.resolve(name)
    except griffe.NameResolutionError:
        path = name
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'
