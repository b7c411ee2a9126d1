"""A report as text or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from neo_components.inspection.report import Report


def as_json(report: Report) -> str:
    """The report as JSON, with sums and FLOPs per token; FLOPs and bytes are integers."""
    values: dict[str, Any] = asdict(report)
    values["groups"] = {name: {"parameters": n, "trained": t} for name, (n, t) in report.groups.items()}
    values["total"] = {"parameters": report.total[0], "trained": report.total[1]}
    if report.flops:
        sums = {
            key: sum(getattr(part, key) for part in report.flops.values()) for key in ("forward", "backward", "again")
        }
        values["flops"]["all"] = sums
        values["flops_per_token"] = {
            name: {key: value / report.tokens for key, value in part.items()} for name, part in values["flops"].items()
        }
    return json.dumps(values, indent=1)


def as_text(report: Report) -> str:
    """The report as tables."""
    parts = [f"recipe: {report.recipe}", _parameters(report)]
    if report.flops:
        parts += [_flops(report), _memory(report)]
    if report.assumptions:
        parts.append("\n".join(["assumptions and settings", *_pairs(report.assumptions)]))
    parts += [f"note: {note}" for note in report.notes]
    parts += [f"WARNING: {warning}" for warning in report.warnings]
    return "\n\n".join(parts)


def _parameters(report: Report) -> str:
    lines = [f"{'parameters':28s} {'all':>16s} {'trainable':>16s} {'frozen':>16s}"]
    for name, (count, trained) in (*report.groups.items(), ("full model", report.total)):
        lines.append(f"{name:28s} {count:16,d} {trained:16,d} {count - trained:16,d}")
    return "\n".join(lines)


def _flops(report: Report) -> str:
    head = f"{'GFLOPs per token':28s} {'forward':>16s} {'backward':>16s} {'recomputed':>16s} {'TFLOPs per step':>16s}"
    lines = [head]
    totals = [0, 0, 0]
    for name, part in report.flops.items():
        numbers = [part.forward, part.backward, part.again]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        lines.append(_flops_line(name, numbers, report.tokens))
    lines.append(_flops_line("all", totals, report.tokens))
    lines.append(
        f"a step has {report.tokens:,d} tokens; " + (f"all steps take {_time(report.hours)}" if report.hours else "")
    )
    return "\n".join(lines)


def _flops_line(name: str, numbers: list[int], tokens: int) -> str:
    each = " ".join(f"{number / tokens / 1e9:16.4g}" for number in numbers)
    return f"{name:28s} {each} {sum(numbers) / 1e12:16.4g}"


def _memory(report: Report) -> str:
    lines = [f"{'memory per device':28s} {'GB':>16s}"]
    lines += [f"{kind:28s} {size / 1e9:16.3f}" for kind, size in report.memory.items()]
    lines.append(f"{'peak':28s} {report.peak / 1e9:16.3f}")
    if report.device_memory is not None:
        lines.append(f"{'device memory':28s} {report.device_memory / 1e9:16.3f}")
    return "\n".join(lines)


def _pairs(values: dict[str, Any]) -> list[str]:
    return [f"{name:28s} {value}" for name, value in values.items()]


def _time(hours: float) -> str:
    return f"{hours:.3g} hours" if hours >= 0.1 else f"{60 * hours:.3g} minutes"
