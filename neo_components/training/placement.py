"""Device, precision, number of devices and strategy of a run, from the recipe's ``trainer`` section."""

from __future__ import annotations

import os

import torch

from neo_components.estimate.memory import Plan
from neo_components.estimate.tracing import Setting
from neo_components.recipe import Recipe

PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None), "32": (None, None), "64-true": (None, torch.float64), "64": (None, torch.float64),
    "bf16-mixed": (torch.bfloat16, None), "bf16": (torch.bfloat16, None), "bf16-true": (None, torch.bfloat16),
    "16-mixed": (torch.float16, None), "16": (torch.float16, None), "16-true": (None, torch.float16),
}  # fmt: skip
"""Lightning's names -> (autocast dtype or ``None``, dtype of the weights or ``None`` for the model's own)."""


def device_of(recipe: Recipe) -> str:
    """``cpu`` or ``cuda``: the recipe's accelerator, or with ``auto`` this machine's."""
    accelerator = str(recipe.trainer.get("accelerator") or "auto")
    if accelerator in ("gpu", "cuda"):
        return "cuda"
    return "cuda" if accelerator == "auto" and torch.cuda.is_available() else "cpu"


def setting_of(recipe: Recipe, plan: Plan) -> Setting:
    """Device and precision of a recipe.

    Raises:
        ValueError: if the precision is unknown.
    """
    precision = str(recipe.trainer.get("precision") or "32-true")
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision {precision!r} is unknown; known: {', '.join(PRECISIONS)}")
    autocast, weights = PRECISIONS[precision]
    if plan.strategy == "fsdp2" and autocast is not None:
        # FSDP casts the gathered weights, so autocast has no effect.
        return Setting(device_of(recipe), None, autocast)
    return Setting(device_of(recipe), autocast, weights)


def plan_of(recipe: Recipe, strategy: str | None = None, devices: int | None = None) -> Plan:
    """How a model is placed on devices; an argument overrides the recipe."""
    count = devices or devices_of(recipe)
    together = recipe.given_stage.context_parallel if recipe.given_stage is not None else 1
    own = str(recipe.trainer.get("strategy") or "auto")
    return Plan(strategy or ("fsdp2" if own == "fsdp2" else "ddp" if count > 1 else "single"), count, together)


def devices_of(recipe: Recipe) -> int:
    """Number of processes: devices per node times nodes; ``auto`` and -1 mean all devices of this machine."""
    devices = recipe.trainer.get("devices") or "auto"
    if isinstance(devices, str) and "," in devices:
        devices = [part for part in devices.split(",") if part.strip()]
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if device_of(recipe) == "cuda" else 1
    else:
        count = int(devices)
    return count * int(recipe.trainer.get("num_nodes") or 1)


def accumulates(recipe: Recipe) -> bool:
    """Whether a process accumulates the gradients of several micro-batches."""
    return int(recipe.trainer.get("accumulate_grad_batches") or 1) > 1


def device_memory(device: str) -> tuple[int | None, str]:
    """Bytes of memory of one device of this machine (``None`` if unknown), and the source of the number."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "found: this machine's memory"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, f"found: {torch.cuda.get_device_name(0)}"
    return None, "not known: there is no GPU here, and no --device-memory"
