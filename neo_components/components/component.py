"""The base of all components."""

from __future__ import annotations

from typing import Any

import lightning


class Component(lightning.LightningModule):
    """A LightningModule that computes, and never logs, schedules or optimises; ``training/`` does that.

    Its flat keyword arguments are kept in ``hparams`` as plain values, so that it can be built again from them.
    """

    @property
    def hparams(self) -> Any:
        """The keyword arguments, as attributes and as a mapping."""
        return super().hparams
