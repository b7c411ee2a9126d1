"""The bases of components where there is no Lightning.

Stands in for ``components/component.py``, ``components/pre_buffer_files.py`` and ``components/post_llm_files.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


class Arguments(dict[str, Any]):
    """Keyword arguments, as attributes and as a mapping."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class Component(nn.Module):
    """A module that remembers its keyword arguments in ``hparams``."""

    hparams: Arguments
    given: dict[str, Any]

    def save_hyperparameters(self) -> None:
        """Keeps the arguments of the ``__init__`` that calls it, with the values that they have then."""
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        values = frame.f_back.f_locals
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        self.hparams = Arguments({name: values[name] for name in names if name in values})

    def keep_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Keeps keyword arguments as ``hparams``."""
        self.hparams = Arguments(arguments)


class PreBufferFiles(Component):
    """Base of ``PreBuffer``; transformers loads and saves it."""


class PostLLMFiles(Component):
    """Base of ``PostLLM``; transformers loads and saves it."""
