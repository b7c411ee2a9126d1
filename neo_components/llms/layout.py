"""A family's files, seen as the tensors of a post-LLM; and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from neo_components.llms.family import Family, Group, Sizes
from neo_components.storage.weights import TensorFiles


class FamilyFiles:
    """The stored tensors of a language model under names that each stand for one tensor of the post-LLM.

    What a group of the family makes from other tensors is called ``<stored name> -> <our name>``.

    Args:
        files: the files.
        family: the family.
        sizes: arguments of the post-LLM.
        names: of the post-LLM's pretrained tensors.
    """

    def __init__(self, files: TensorFiles, family: Family, sizes: Sizes, names: Iterable[str]) -> None:
        self.folder: Path = files.folder
        self.files, self.family, self.sizes = files, family, sizes
        self._stored = set(files.names())
        self._ours: dict[str, str] = {}
        self._made: dict[str, tuple[Group, int, list[str]]] = {}
        for name in names:
            self._locate(name)

    def _locate(self, name: str) -> None:
        """Finds what one of our tensors is called here."""
        group = self._group_of(name)
        if group is None:
            self._ours[name] = self._known(self.family.rename(name))
            return
        block, inner = _split(name)
        parts = [self._known(_join(self.family.rename(block), part)) for part in group.stored(self.sizes)]
        virtual = f"{parts[0]} -> {inner}"
        self._ours[name] = virtual
        self._made[virtual] = (group, group.ours.index(inner), parts)

    def _group_of(self, name: str) -> Group | None:
        inner = _split(name)[1]
        for group in self.family.groups:
            ours = self._known(self.family.rename(name)) if group.optional else ""
            if inner in group.ours and ours not in self._stored:
                return group
        return None

    def _known(self, names: str | tuple[str, ...]) -> str:
        """Of several possible names the one that the files have."""
        if isinstance(names, str):
            return names
        return next((name for name in names if name in self._stored), names[0])

    def rename(self, name: str) -> str:
        """A post-LLM weight's name -> its name here."""
        return self._ours[name]

    def names(self) -> list[str]:
        """Names of all tensors: of those made, if all their parts are stored; and of the stored ones that are left."""
        made = {name: parts for name, (_, _, parts) in self._made.items() if self._stored.issuperset(parts)}
        used = {part for parts in made.values() for part in parts}
        return [*sorted(self._stored - used), *made]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor of that name; no values are read."""
        if name not in self._made:
            return self.files.shape(name)
        group, index, parts = self._made[name]
        stored = [torch.empty(self.files.shape(part), device="meta") for part in parts]
        return tuple(group.read(self.sizes, stored)[index].shape)

    def read_into(self, name: str, target: Tensor) -> None:
        """Copies the tensor of that name into one of the same shape."""
        if name in self._made:
            target.copy_(self.get(name))
        else:
            self.files.read_into(name, target)

    def get(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU."""
        if name not in self._made:
            return self.files.get(name)
        group, index, parts = self._made[name]
        return group.read(self.sizes, [self.files.get(part) for part in parts])[index]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the tensor of that name; of one that is not made, no others are read."""
        return self.get(name)[start:stop] if name in self._made else self.files.rows(name, start, stop)

    def superfluous(self) -> list[str]:
        """Stored tensors that the post-LLM does not want: the head beside a tied embedding, and what is no part of the
        language model."""
        extra = {name for name in self._stored if self.family.superfluous(name)}
        if self.sizes["tie_embeddings"]:
            head = self.family.rename("lm_head.weight")
            extra.update((head,) if isinstance(head, str) else head)
        return sorted(extra)


def to_stored(state: Mapping[str, Tensor], family: Family, sizes: Sizes, in_memory: bool = False) -> dict[str, Tensor]:
    """The pretrained tensors of a post-LLM under the names and in the form of the family's files.

    Args:
        state: by the post-LLM's names, without the H/W parts.
        family: the family.
        sizes: arguments of the post-LLM.
        in_memory: as transformers holds them, where it stacks what it writes one by one (experts).
    """
    groups = [group for group in family.groups if not (in_memory and group.optional)]
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, inner = _split(name)
        group = next((group for group in groups if inner in group.ours), None)
        if group is None:
            stored[_first(family.rename(name))] = tensor
        elif inner == group.ours[0]:
            ours = [state[block + part] for part in group.ours]
            names = [_first(family.rename(block)) + part for part in group.stored(sizes)]
            stored.update(zip(names, group.write(sizes, ours), strict=True))
    return stored


def _first(names: str | tuple[str, ...]) -> str:
    return names if isinstance(names, str) else names[0]


def _join(block: str | tuple[str, ...], inner: str) -> str | tuple[str, ...]:
    return block + inner if isinstance(block, str) else tuple(name + inner for name in block)


def _split(name: str) -> tuple[str, str]:
    """``layers.3.mlp.x`` -> ``layers.3.`` and ``mlp.x``; a name outside the blocks has no block."""
    parts = name.split(".", 2)
    if parts[0] != "layers":
        return "", name
    return f"{parts[0]}.{parts[1]}.", parts[2]
