"""What a measured step reports beside its time: largest kernels, graph breaks, the estimate of its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from neo_components import NEO, Batch
from neo_components.estimate.activations import kept_activations
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import Setting
from neo_components.training.callbacks.performance import peak_flops


def largest_kernels(step: Callable[[], Any], device: str, count: int = 10) -> dict[str, Any]:
    """Profiles one step: its kernels with the most time on a GPU, its operators on a CPU.

    Returns:
        ``busy_ms``, the sum over all of them, and ``largest``: name, calls, milliseconds, and share of that sum.
    """
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        step()
        if cuda:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    rows = [event for event in profiled.key_averages() if event.device_type == kind]
    spent = {id(row): (row.self_device_time_total if cuda else row.self_cpu_time_total) / 1e3 for row in rows}
    busy = sum(spent.values())
    rows.sort(key=lambda row: -spent[id(row)])
    largest = [
        {"name": row.key, "calls": row.count, "ms": round(spent[id(row)], 3), "share": round(spent[id(row)] / busy, 4)}
        for row in rows[:count]
    ]
    return {"busy_ms": round(busy, 3), "largest": largest}


def graph_counts() -> dict[str, Any]:
    """Compiled graphs of this process so far, and how often and why a graph was broken."""
    from torch._dynamo.utils import counters

    return {"graphs": counters["stats"]["unique_graphs"], "breaks": dict(counters["graph_break"])}


def estimated_peak(model: NEO, batch: Batch, device: str, bf16: bool) -> int:
    """Bytes of a step by the library's own estimate, that of ``neo inspect``, for a batch on the CPU."""
    setting = Setting(device, torch.bfloat16 if bf16 else None)
    return step_memory(model, batch, setting, Plan(), kept_activations(model, batch, setting)).peak


def peak_tflops(given: float | None) -> float | None:
    """Peak TFLOP/s in bfloat16: as given, or that of this GPU if it is known."""
    if given is not None:
        return given
    known = peak_flops(torch.cuda.get_device_name(), "bf16") if torch.cuda.is_available() else None
    return known / 1e12 if known else None


def kernel_table(report: dict[str, Any], seconds: float) -> str:
    """The largest kernels as text."""
    busy = f"{report['busy_ms']:.1f} ms in all, of a step of {1e3 * seconds:.1f} ms"
    lines: Sequence[str] = [
        f"{one['ms']:10.2f} {one['share']:7.1%} {one['calls']:6d}  {one['name'][:90]}" for one in report["largest"]
    ]
    return "\n".join([f"  largest kernels ({busy}):", f"{'ms':>10s} {'share':>7s} {'calls':>6s}  name", *lines])


def details(row: dict[str, Any]) -> str:
    """Memory, graphs and kernels of a row as text."""
    ratio = row["peak"] / row["estimated_peak"]
    breaks = sum(row["breaks"].values())
    return "\n".join([
        f"  median {row['median_seconds']:.3f} s, {row['flops'] / 1e12:.3f} TFLOP, loss {row['loss']:.4f}",
        f"  peak memory {row['peak'] / 1e9:.3f} GB, estimated {row['estimated_peak'] / 1e9:.3f} GB: ratio {ratio:.3f}",
        f"  {row['graphs']} compiled graphs, {breaks} graph breaks, {row['compiled_after_first_step']} graphs compiled "
        "after the first step",
        *(f"  graph break, {count} times: {reason.splitlines()[0]}" for reason, count in row["breaks"].items()),
        kernel_table(row["kernels"], row["seconds"]),
    ])  # fmt: skip
