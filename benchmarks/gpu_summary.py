"""All figures of a run of ``benchmarks/gpu.sh`` beside their targets, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_steps import Step

PART_SECONDS = 240.0


@dataclass(frozen=True)
class Target:
    """A figure and what it should be.

    Args:
        name: what is measured.
        value: the figure; ``None``: not measured.
        wanted: the target in words.
        met: whether the figure meets it; ``None``: not measured.
    """

    name: str
    value: float | None
    wanted: str
    met: bool | None


def target(name: str, value: float | None, wanted: str, right: Callable[[float], bool]) -> Target:
    """A target that is met if ``right(value)``."""
    return Target(name, value, wanted, None if value is None else right(value))


def _read(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def targets(output: Path, seconds: dict[int, float]) -> list[Target]:
    """Every target of the design with its figure."""
    found = []
    for stage, wanted in ((1, 0.45), (3, 0.50)):
        step = _read(output / f"train_step_stage_{stage}" / "train_step.json")
        row = step["rows"][0] if step else {}
        name = f"stage {stage}, 8192 tokens"
        found += [
            target(f"{name}: MFU", row.get("mfu"), f"at least {wanted:.2f}", lambda x, least=wanted: x >= least),
            target(f"{name}: graph breaks", sum(row["breaks"].values()) if row else None, "0", lambda x: x == 0),
            target(f"{name}: graphs compiled after the first step", row.get("compiled_after_first_step"), "0",
                   lambda x: x == 0),
            target(f"{name}: peak memory over its estimate", row["peak"] / row["estimated_peak"] if row else None,
                   "0.85 to 1.15", lambda x: 0.85 <= x <= 1.15),
        ]  # fmt: skip
    found.append(target("decoding, batch 1: share of the bandwidth bound", decoded(output), "at least 0.70",
                        lambda x: x >= 0.7))  # fmt: skip
    wait = _read(output / "data_wait" / "data_wait.json")
    found.append(target("share of a step that waits for data", wait["share"] if wait else None, "at most 0.02",
                        lambda x: x <= 0.02))  # fmt: skip
    for part, gone in seconds.items():
        found.append(target(f"part {part}: seconds", gone or None, f"at most {PART_SECONDS:.0f}",
                            lambda x: x <= PART_SECONDS + 5))  # fmt: skip
    return found


def decoded(output: Path) -> float | None:
    """Share of the bandwidth bound at batch 1, the best of all ways in the result of ``benchmarks/decode.py``."""
    found = _read(output / "decode" / "decode.json")
    return max((row["bound_share"] for row in found["rows"] if row["batch"] == 1), default=None) if found else None


def last_results(path: Path) -> dict[str, dict[str, Any]]:
    """The last result of each test by name; a line that was cut off is passed over."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[one["test"]] = one
    return found


def counted_tests(output: Path) -> dict[str, Any]:
    """How many tests passed, failed, were skipped or broken off, and the names of those that did not pass."""
    last = last_results(output / "tests.jsonl")
    counts = Counter(one["outcome"] for one in last.values())
    missed = sorted((name, one["outcome"]) for name, one in last.items() if one["outcome"] != "passed")
    return {"counts": dict(counts), "not_passed": [f"{outcome} {name}" for name, outcome in missed]}


def quickstart_score(output: Path) -> dict[str, Any] | None:
    """Score and minutes of the quickstart."""
    report = _read(output / "quickstart" / "report.json")
    if report is None:
        return None
    return {"accuracy": report["accuracy"]["overall"], "minutes": report["minutes"]["total"], "scale": report["scale"]}


def summary(output: Path, steps: Sequence[Step]) -> tuple[dict[str, Any], str]:
    """The state of every step and every target, as values and as text."""
    states: dict[str, Any] = {}
    for step in steps:
        one = _read(output / f"part_{step.part}_{step.name}.json") or {"status": "not run", "seconds": 0.0}
        states[step.name] = {name: one.get(name) for name in ("status", "seconds", "reason")} | {"part": step.part}
    seconds = {part: sum(s["seconds"] for s in states.values() if s["part"] == part) for part in (1, 2, 3)}
    setting, machine = _read(output / "setting.json"), _read(output / "machine.json")
    aims = targets(output, seconds)
    if setting["tiny"]:  # figures of a rehearsal meet and miss nothing
        aims = [replace(aim, met=None) for aim in aims]
    tests, score = counted_tests(output), quickstart_score(output)
    values = {
        "machine": machine, "setting": setting, "steps": states, "tests": tests,
        "quickstart": score, "targets": [asdict(aim) for aim in aims],
    }  # fmt: skip
    about = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"
    lines = [f"summary: {about}", "", f"{'part':4s} {'step':20s} {'state':12s} {'s':>6s}"]
    lines += [
        f"{s['part']:4d} {name:20s} {s['status']:12s} {s['seconds']:6.0f}  {s['reason'] or ''}".rstrip()
        for name, s in states.items()
    ]
    lines += ["", "tests: " + (", ".join(f"{n} {what}" for what, n in sorted(tests["counts"].items())) or "none run")]
    lines += [f"  {outcome.upper()}: {name}" for outcome, name in (one.split(" ", 1) for one in tests["not_passed"])]
    if score:
        lines.append(
            f"quickstart: {score['accuracy']:.4f} overall in {score['minutes']:.2f} min, scale {score['scale']}"
        )
    lines += ["", f"{'target':60s} {'figure':>10s}  {'wanted':14s}"]
    for aim in aims:
        figure = "-" if aim.value is None else f"{aim.value:.4g}"
        unknown = "not measured" if aim.value is None else "tiny: says nothing"
        verdict = {None: unknown, True: "met", False: "MISSED"}[aim.met]
        lines.append(f"{aim.name:60s} {figure:>10s}  {aim.wanted:14s} {verdict}")
    return values, "\n".join(lines)
