"""The base class of all components: a LightningModule whose flat arguments are its ``hparams``."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import lightning


class Component(lightning.LightningModule):
    """A LightningModule that computes, and never logs, schedules or optimizes; ``training/`` does that.

    Its flat keyword arguments are kept in ``hparams`` as plain values, so that it can be built again from them.
    """

    given: dict[str, Any]
    """All arguments, while a constructor with flat block arguments runs (``block_arguments.flat_arguments``)."""

    @property
    def hparams(self) -> Any:
        """The keyword arguments, as attributes and as a mapping."""
        # Lightning's own property is opaque to torch.compile.
        return self.__dict__["_hparams"] if "_hparams" in self.__dict__ else super().hparams

    def keep_arguments(self, arguments: Mapping[str, Any]) -> None:
        """Keeps keyword arguments as ``hparams``, for a constructor that has completed some of them."""
        # What Lightning's save_hyperparameters ends with; it reads them off the constructor's frame otherwise.
        self._set_hparams(dict(arguments))
        self._hparams_initial = deepcopy(self._hparams)
