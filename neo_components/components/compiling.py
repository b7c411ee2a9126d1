"""Functions that are compiled where their device needs it, whatever is asked of them in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

FORMS = 64
"""How many forms of one function a process compiles: shapes, types, with and without gradients, of all its models."""


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` as one graph, with room for :data:`FORMS` of it.

    Torch's own limit of 8 is met by one model in training and validation beside another one. Past a limit a function
    would go on uncompiled, or with one graph raise an error.

    Args:
        function: compiled at its first call, and again for each new form.
        options: of ``torch.compile``.
    """
    allow_forms()
    return torch.compile(function, fullgraph=True, **options)


def allow_forms() -> None:
    """Raises torch's limits for this process to :data:`FORMS`."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, FORMS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * FORMS)
