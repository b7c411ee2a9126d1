"""Runs everything that needs a GPU, in three parts under a time limit each, and goes on where it was cut off.

    benchmarks/gpu.sh --output FOLDER [--wheels FOLDER] [--parts 1 2 3] [--again] [--device cpu --tiny]

1. tests marked ``gpu``: attention on all backends, stages, synchronization, generation, exports, resuming;
2. a training step at the 2.2B shape in stages 1 and 3, decoding, and the share of a step that waits for data;
3. the quickstart, then the pretraining of the shipped asset as far as the time allows.

``--output`` gets for each step its log (``.txt``) and result (``.json``, with device, driver, versions, date and
commit), and ``summary.txt`` and ``summary.json`` with all figures beside their targets. Exit status: 0 if every step
passed, 1 if one failed, 3 if some are not finished: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_environment import describe, install, unmet, use, write_json
from gpu_steps import Step, all_steps, execute
from gpu_summary import summary

LEAST = 20.0
"""A step is not started with fewer seconds left."""


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of results; the same one to go on")
    parser.add_argument("--wheels", type=Path, help="folder of wheels of packages that this machine lacks")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=4.0, help="limit of each part (default: 4)")
    parser.add_argument("--again", action="store_true", help="repeat what has passed")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to rehearse on a CPU")
    parser.add_argument("--commit", help="of this tree, where it is no repository")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: a CPU would take hours for the full shapes")
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    options.output, options.parts = options.output.resolve(), sorted(set(options.parts))
    return options


def say(text: str = "") -> None:
    print(text, flush=True)


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Installs wheels, checks packages, and returns the description of the machine.

    Raises:
        ModuleNotFoundError: if a package is missing.
        ValueError: if the folder holds the results of another setting.
    """
    options.output.mkdir(parents=True, exist_ok=True)
    site = options.output / "site"
    use(site)
    if options.wheels is not None:
        installed = install(options.wheels, site)
        say(f"installed into {site}: {', '.join(installed) or 'nothing, all is there'}")
        use(site)
    missing, other = unmet()
    if missing:
        raise ModuleNotFoundError(
            f"missing: {', '.join(missing)}. Carry them: python benchmarks/gpu_wheels.py FOLDER --python "
            f"{sys.version_info.major}.{sys.version_info.minor} on a machine with network, then --wheels FOLDER"
        )
    if other:
        say(f"WARNING: not the required versions: {', '.join(other)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.tiny:  # threads that wait for each other take most of the time of a tiny model
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.output / "compiled"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(options.output / "compiled" / "triton"))
    setting = {"device": options.device, "tiny": options.tiny}
    kept = options.output / "setting.json"
    if kept.is_file() and (before := json.loads(kept.read_text())) != setting:
        made = f"--device {before['device']} with{'' if before['tiny'] else 'out'} --tiny"
        raise ValueError(f"{options.output} holds results made with {made}; choose another --output")
    machine = describe(options.device, options.commit)
    write_json(kept, setting)
    write_json(options.output / "machine.json", machine)
    for name, value in machine.items():
        say(f"{name:14s} {value}")
    return machine


def result_of(output: Path, step: Step) -> dict[str, Any]:
    """What an earlier attempt at a step left; empty if there was none."""
    path = output / f"part_{step.part}_{step.name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def run_part(part: int, steps: list[Step], options: argparse.Namespace, machine: dict[str, Any]) -> None:
    """Runs the steps of a part that have not passed, until its time is over."""
    began = time.monotonic()
    for number, step in enumerate(steps, 1):
        title = f"[part {part}, {number} of {len(steps)}] {step.name}"
        before = result_of(options.output, step)
        if before.get("status") == "passed" and not options.again:
            say(f"\n{title}: passed before, at {before['machine']['commit']} ({before['machine']['date']})")
            continue
        left = 60 * options.minutes - (time.monotonic() - began)
        log = options.output / f"part_{part}_{step.name}.txt"
        result: dict[str, Any] = {"part": part, "name": step.name, "command": step.command, "machine": machine}
        if step.needs is not None and not step.needs.exists():
            say(f"\n{title}: left out, as {step.needs} does not exist")
            result |= {"status": "left out", "seconds": 0.0, "reason": f"{step.needs} does not exist"}
        elif left < LEAST:
            say(f"\n{title}: not started, {left:.0f} s of this part's {options.minutes:g} min are left")
            result |= {"status": "not started", "seconds": 0.0}
        else:
            say(f"\n{title}, at most {left:.0f} s\n$ {' '.join(step.command)}")
            step.clear()
            ended = execute(step, left, log, say)
            result |= {"status": ended.status, "seconds": round(ended.seconds, 1), "returncode": ended.returncode}
            say(f"{title}: {ended.status.upper()} after {ended.seconds:.0f} s (exit status {ended.returncode})")
        write_json(log.with_suffix(".json"), result)


def main() -> int:
    options = options_of()
    try:
        machine = prepare(options)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        say(f"error: {error}")
        return 1
    if options.again and 1 in options.parts:
        (options.output / "tests.jsonl").unlink(missing_ok=True)
    steps = all_steps(options.output, options.device, options.tiny, machine)
    for part in options.parts:
        run_part(part, [step for step in steps if step.part == part], options, machine)
        write_json(options.output / "summary.json", summary(options.output, steps)[0])
    found, text = summary(options.output, steps)
    say("\n" + text)
    (options.output / "summary.txt").write_text(text + "\n", encoding="utf-8")
    states = {found["steps"][step.name]["status"] for step in steps if step.part in options.parts}
    return 1 if "failed" in states else 3 if states & {"cut off", "not started"} else 0


if __name__ == "__main__":
    sys.exit(main())
