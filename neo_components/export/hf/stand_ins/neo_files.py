"""Stands in for ``model/neo_files.py``."""

from __future__ import annotations

from neo_components.model.parts import NEOParts


class NEOFiles(NEOParts):
    """Base of ``NEO``; transformers loads and saves it."""
