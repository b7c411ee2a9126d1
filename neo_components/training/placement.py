"""Where a recipe's run takes place, read off its trainer section: device, precision, number of devices, strategy."""

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
"""Lightning's names: type under autocast, type of the weights (``None``: the model's own)."""


def device_of(recipe: Recipe) -> str:
    """``cpu`` or ``cuda``: what the recipe says, or what this machine has."""
    said = str(recipe.trainer.get("accelerator") or "auto")
    if said in ("gpu", "cuda"):
        return "cuda"
    return "cuda" if said == "auto" and torch.cuda.is_available() else "cpu"


def setting_of(recipe: Recipe, plan: Plan) -> Setting:
    """Device and precision of a recipe.

    Raises:
        ValueError: if the precision is none that can be told about.
    """
    precision = str(recipe.trainer.get("precision") or "32-true")
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision {precision!r} is not known here; known: {', '.join(PRECISIONS)}")
    autocast, weights = PRECISIONS[precision]
    if plan.strategy == "fsdp2" and autocast is not None:
        # FSDP casts what it gathers, so that nothing is left to autocast.
        return Setting(device_of(recipe), None, autocast)
    return Setting(device_of(recipe), autocast, weights)


def plan_of(recipe: Recipe, strategy: str | None = None, devices: int | None = None) -> Plan:
    """How a recipe lays its model over devices; an argument that is given stands instead of what it says."""
    count = devices or devices_of(recipe)
    said = str(recipe.trainer.get("strategy") or "auto")
    return Plan(strategy or ("fsdp2" if said == "fsdp2" else "ddp" if count > 1 else "single"), count)


def devices_of(recipe: Recipe) -> int:
    """Processes of the recipe: devices of a node times nodes; of ``auto`` and -1 those of this machine."""
    said = recipe.trainer.get("devices") or "auto"
    if isinstance(said, str) and "," in said:
        said = [part for part in said.split(",") if part.strip()]
    if isinstance(said, list):
        count = len(said)
    elif str(said) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if device_of(recipe) == "cuda" else 1
    else:
        count = int(said)
    return count * int(recipe.trainer.get("num_nodes") or 1)


def accumulates(recipe: Recipe) -> bool:
    """Whether a step is put together from several batches."""
    return int(recipe.trainer.get("accumulate_grad_batches") or 1) > 1


def device_memory(device: str) -> tuple[int | None, str]:
    """Bytes of one device of this machine, and where that is known from."""
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "found: this machine's memory"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, f"found: {torch.cuda.get_device_name(0)}"
    return None, "not known: there is no GPU here, and no --device-memory"
