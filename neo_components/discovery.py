"""Imports the parts that ship, so that they register themselves (``registry.py``).

An exported folder has another file of this name, which lists the parts beside it (``export/hf/bundle.py``).
"""

from __future__ import annotations

import pkgutil
from importlib import import_module


def import_parts(home: str) -> None:
    """Imports a module, and if it is a package the modules in it.

    Args:
        home: dotted name.
    """
    module = import_module(home)
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        import_module(f"{home}.{found.name}")
