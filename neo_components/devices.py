"""Devices and precisions by the names that commands take: ``--device`` and ``--dtype``.

A device that is not there, or a type that it cannot compute in, is an error. What is left to ``auto`` is chosen among
the devices and types that work.
"""

from __future__ import annotations

import platform
import re

import torch

from neo_components.storage.weights import DTYPES, as_dtype

AUTO = "auto"
NAMES = "auto, cpu, cuda, cuda:N (the N-th GPU, from 0) or mps (Apple)"
PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed"}
"""Types of ``--dtype`` for a command that trains -> Lightning's precision. Weights stay float32 in both."""


def find_device(name: str | torch.device = AUTO) -> torch.device:
    """The device of a name, with its number if it is a GPU.

    Args:
        name: ``auto`` (cuda if there is one, else mps, else cpu), ``cpu``, ``cuda`` (the first), ``cuda:N``, ``mps``.

    Raises:
        ValueError: if the name is unknown, or the device is not there; the message lists those that are.
    """
    if str(name) == AUTO:
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("mps" if _has_mps() else "cpu")
    found = re.fullmatch(r"(cuda)(?::(\d+))?|cpu|mps", str(name))
    if found is None:
        raise ValueError(f"device must be {NAMES}, got {str(name)!r}")
    if found[1]:
        number = int(found[2] or 0)
        if not torch.cuda.is_available() or number >= torch.cuda.device_count():
            raise ValueError(_absent(str(name)))
        return torch.device("cuda", number)
    if str(name) == "mps" and not _has_mps():
        raise ValueError(_absent(str(name)))
    return torch.device(str(name))


def find_training_device(name: str | torch.device = AUTO) -> torch.device:
    """As :func:`find_device`, for a command that trains: ``auto`` is cuda if there is one, else cpu.

    Raises:
        ValueError: as there, and for ``mps``.
    """
    if str(name) == AUTO and not torch.cuda.is_available():
        return torch.device("cpu")
    device = find_device(name)
    if device.type == "mps":
        raise ValueError(
            "device 'mps' cannot train: losses are summed in float64, which it does not have; give cpu "
            "(neo chat, evaluate, attach and export compute on mps)"
        )
    return device


def find_dtype(name: str | torch.dtype, device: torch.device, saved: str | torch.dtype = torch.float32) -> torch.dtype:
    """The type to compute in.

    Args:
        name: ``float32``, ``bfloat16``, ``float16``, or ``auto``: ``saved``, or float32 where the device does not
            compute in that.
        device: where; see :func:`find_device`.
        saved: type of the weights in their files.

    Raises:
        ValueError: if the name is unknown, or the device does not compute in that type.
    """
    if isinstance(name, str) and name not in (AUTO, *DTYPES):
        raise ValueError(f"dtype must be one of {AUTO}, {', '.join(DTYPES)}, got {name!r}")
    if name == AUTO:
        dtype = as_dtype(saved)
        return torch.float32 if _why_not(dtype, device) else dtype
    dtype = as_dtype(name)
    if reason := _why_not(dtype, device):
        raise ValueError(f"dtype {_name(dtype)!r} on device {str(device)!r}: {reason}")
    return dtype


def training_precision(name: str, device: torch.device) -> str:
    """Lightning's ``precision`` for a name of ``--dtype``: ``auto`` is bf16-mixed, or 32-true where the device has no
    bfloat16.

    Raises:
        ValueError: if the name is unknown, or no training is possible in that type on that device.
    """
    dtype = find_dtype(name, device, torch.bfloat16)
    if dtype not in PRECISIONS:
        raise ValueError(
            f"dtype {_name(dtype)!r} cannot train: its range is too small for gradients without loss scaling; give "
            f"{' or '.join(map(_name, PRECISIONS))}"
        )
    return PRECISIONS[dtype]


def trainer_overrides(device: torch.device) -> list[str]:
    """Overrides of a recipe that run it on this one device."""
    devices = f"[{device.index}]" if device.type == "cuda" else "1"
    return [f"trainer.accelerator={device.type}", f"trainer.devices={devices}", "trainer.num_nodes=1"]


def describe(device: torch.device) -> str:
    """A device for people, such as ``cuda:0 (NVIDIA H100 80GB HBM3)``."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return (
        f"{device} ({platform.machine()}, {torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)
    )


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; Apple's do not."""
    return device.type != "mps"


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _absent(name: str) -> str:
    """The message for a device that is not there."""
    there = [torch.device("cpu"), *(torch.device("cuda", number) for number in range(torch.cuda.device_count()))]
    if _has_mps():
        there.append(torch.device("mps"))
    built = torch.backends.mps.is_built() if name == "mps" else torch.backends.cuda.is_built()
    reason = "torch does not find it" if built else "this build of torch is made without it"
    return (
        f"device {name!r} is not there: {reason} (torch {torch.__version__}); available: "
        f"{', '.join(map(describe, there))}"
    )


def _why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a device does not compute in a type; ``None`` if it does."""
    if dtype is torch.float16 and device.type == "cpu":
        return "a CPU computes float16 slowly and overflows beyond 65504; give float32, or bfloat16 for half the memory"
    if dtype is torch.bfloat16 and device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"{describe(device)} has no bfloat16 (compute capability {major}.{minor}, 8.0 is needed); " + (
                "give float32 or float16"
            )
    if dtype is torch.bfloat16 and device.type == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        return "bfloat16 needs macOS 14 there; give float32 or float16"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
