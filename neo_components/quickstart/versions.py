"""Versions of the packages and the machine, for reports."""

from __future__ import annotations

import platform

import torch


def versions() -> dict[str, str]:
    """Version of each package; ``machine`` is the processor and the number of threads."""
    import lightning
    import transformers

    import neo_components

    return {
        "neo_components": neo_components.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
