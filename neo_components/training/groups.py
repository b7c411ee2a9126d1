"""What a stage trains: named groups of parameters, chosen by module and never by a substring of a name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from neo_components.model.neo import NEO


def train_only(model: NEO, names: Sequence[str], adapters: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
    """Lets the named groups learn and freezes all else.

    Args:
        model: the model.
        names: groups of ``NEO.groups()``, or ``all``.
        adapters: parameters that learn whatever is named (``lora.add_lora``).

    Returns:
        The trainable parameters.

    Raises:
        ValueError: if a name is unknown, or nothing is left to train.
    """
    groups = model.groups() | {"all": list(model.parameters())}
    for name in names:
        if name not in groups:
            near = difflib.get_close_matches(name, groups, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"stage.train: no group {name!r}{hint} (groups: {', '.join(groups)})")
    model.requires_grad_(False)
    for name in names:
        for parameter in groups[name]:
            parameter.requires_grad_(True)
    for parameter in adapters:
        parameter.requires_grad_(True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError(f"stage.train: the groups {list(names)} have no parameters in this model")
    return trainable
