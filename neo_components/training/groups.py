"""The trainable parameters of a stage: named groups, found by module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from neo_components.errors import nearest
from neo_components.model.neo import NEO


def train_only(model: NEO, names: Sequence[str], adapters: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
    """Makes the named groups trainable and freezes everything else.

    Args:
        model: the model.
        names: groups of ``NEO.groups()``, or ``all``.
        adapters: more trainable parameters (``lora.add_lora``).

    Returns:
        The trainable parameters.

    Raises:
        ValueError: if a name is unknown, or there is nothing to train.
    """
    groups = model.groups() | {"all": list(model.parameters())}
    for name in names:
        if name not in groups:
            raise ValueError(f"stage.train: no group {name!r} (groups: {', '.join(groups)}){nearest(name, groups)}")
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
