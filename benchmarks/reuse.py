"""What a pretrained pre-Buffer saves on tasks that it never saw, against random weights of the same shapes.

    python benchmarks/reuse.py probe --source ASSET --packages FOLDER
    python benchmarks/reuse.py run --source ASSET --packages FOLDER
    python benchmarks/reuse.py run --source ASSET --packages FOLDER --pairs 100 1000 --text bypass
    python benchmarks/reuse.py run --source ASSET --packages FOLDER --llms smollm2 --smollm2 FOLDER --seeds 0
    python benchmarks/reuse.py report --figures docs/figures

``probe`` fits linear probes on frozen features (reuse_probe.py), ``run`` trains arm after arm. Both make the target
tasks first (reuse_tasks.py), of the packages of ``neo data pretrain-mix``, and ``run`` the small language model
(reuse_setting.py). An arm is one choice of

- weights of the pre-Buffer: ``reused``; ``random``, new ones of the same shapes; ``whitened``, new ones with the patch
  embedding whitened on the task's images. The better of the last two on each task is the control.
- what trains: ``tuned``, everything; ``frozen``, everything but pre-Buffer and patch embedding. Of real language models
  the H/W channels and adapters train.
- the way of text: ``bypass``, around the pre-Buffer; ``shared``, through it.
- how many question-answer pairs it trains on: all, or with ``--pairs 100 1000`` few.

Arms that differ in the weights alone are compared: recipe, bridges, data, their order, schedule and budget are the same
for one seed, and a seed changes initial weights and data order. Arms of new weights on all pairs train longer, to show
the loss that they reach; the rate is constant after its warm-up.

Every arm is one line of ``arms.jsonl`` when it is done, every probe one of ``probes.jsonl``, and one that is there
already is not run again, so a run can be stopped, continued, and shared by several processes with other tasks, seeds or
language models. An arm is known by the SHA-256 of the asset's weights and of the task's samples and by ``--pixels``,
``--questions``, ``--every`` and ``--set``; ``report`` takes the same options and shows the arms that have them.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import platform
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import reuse_setting as setting
import torch
from reuse_arm import TEXT, WEIGHTS, Arm, steps_of, train_arm
from reuse_figure import draw
from reuse_probe import FEATURES, Probe, probe
from reuse_report import into_page, report
from reuse_store import add, read
from reuse_tasks import PAIRS, TASKS, card_of, make_task

from neo_components.storage.pretrained import StoredFile, resolve_asset


def source_of(source: str) -> tuple[str, str]:
    """Name of an asset in the results, without the folders above it, and the SHA-256 of its weights."""
    name = Path(source).absolute().name if Path(source).is_dir() else source
    return name, StoredFile.of(resolve_asset(source) / "model.safetensors").sha256


def arms_of(options: argparse.Namespace) -> Iterator[Arm]:
    """The arms that a command line selects, seed by seed. Their tasks are there."""
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    choices = (options.seeds, options.llms, options.pairs, options.tasks, options.text, options.train, options.weights)
    source, asset = source_of(options.source)
    for seed, llm, pairs, task, text, train, weights in itertools.product(*choices):
        longer = setting.LONGER if pairs == PAIRS[-1] and weights != "reused" else 1
        yield Arm(
            weights=weights, train=train, text=text, llm=llm, task=task, data=card_of(options.root, task)["sha256"],
            source=source, asset=asset, pairs=pairs, seed=seed, steps=steps_of(llm, options) * longer,
            pixels=options.pixels, questions=options.questions, every=options.every, overrides=options.set,
            device=device,
        )  # fmt: skip


def run_probes(options: argparse.Namespace) -> None:
    """Makes the tasks that are missing, then fits the probes that are not done, of new weights with two seeds."""
    for task in options.tasks:
        make_task(options.root, task, options.packages)
    file, (source, asset) = options.root / "probes.jsonl", source_of(options.source)
    for seed, task, weights in itertools.product(options.seeds[:2], options.tasks, options.weights):
        one = Probe(
            source=source, asset=asset, weights=weights, task=task, data=card_of(options.root, task)["sha256"],
            seed=0 if weights == "reused" else seed, pixels=options.pixels, features="", error=0.0, errors={},
        )  # fmt: skip
        done = {probe.key for probe in read(file, Probe)}
        if missing := [name for name in FEATURES if replace(one, features=name).key not in done]:
            for found in probe(options.root, options.source, one, missing):
                add(file, found)
                print(f"{task}, {weights}, {found.features}: error {found.error:.3f}", flush=True)


def run_arms(options: argparse.Namespace) -> None:
    """Makes what is missing, then trains the arms that are not done."""
    for task in TASKS if setting.SMALL in options.llms else options.tasks:  # the small language model knows all texts
        make_task(options.root, task, options.packages)
    if setting.SMALL in options.llms:
        setting.make_small(options.root)
    file = options.root / "arms.jsonl"
    for arm in arms_of(options):
        if arm.key in {one.key for one in read(file, Arm)}:
            continue
        train_arm(arm, options)
        add(file, arm)
        last = f"loss {arm.curve[-1][1]:.3f}, exact match {arm.scores[-1][1]['overall']:.3f}, {arm.seconds:.0f} CPU s"
        name = f"{arm.task} on {arm.llm}, {arm.weights} {arm.train} {arm.text}, {arm.pairs} pairs, seed {arm.seed}"
        print(f"{name}: {last}", flush=True)


def is_of(one: Any, source: str) -> bool:
    """Whether an arm or probe is of a source: its name, its folder, or the beginning of the SHA-256 of its weights."""
    if Path(source).is_dir():
        return bool(one.asset == source_of(source)[1])
    return bool(one.source == source or (len(source) >= 6 and one.asset.startswith(source)))


def with_control(some: list[Any], source: str, control: str | None) -> list[Any]:
    """The arms or probes of a source; those of new weights from another source of the same shapes, if one is named."""
    found = [one for one in some if is_of(one, source if one.weights == "reused" else control or source)]
    own = {(one.source, one.asset) for one in found if one.weights == "reused"}
    if control is None or len(own) != 1:  # of several, the report complains
        return found
    [(name, asset)] = own
    return [replace(one, source=name, asset=asset) for one in found]


def show(options: argparse.Namespace) -> None:
    """Prints the report; writes it into a page and draws the curves if asked to."""
    all_arms, all_probes = read(options.root / "arms.jsonl", Arm), read(options.root / "probes.jsonl", Probe)
    wanted = options.pixels, options.questions, options.every, tuple(options.set)
    arms = [one for one in all_arms if one.options == wanted]
    probes = [one for one in all_probes if one.pixels == options.pixels]
    if left := len(all_arms) + len(all_probes) - len(arms) - len(probes):
        print(f"left out: {left} arms and probes of other --pixels, --questions, --every or --set", file=sys.stderr)
    if options.source is not None:
        arms, probes = (with_control(some, options.source, options.control) for some in (arms, probes))
    text = report(arms, probes)
    print(text)
    if options.page is not None:
        into_page(text, options.page)
    if options.figures is not None:
        draw(arms, options.figures / "reuse.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["probe", "run", "report"])
    parser.add_argument("--root", type=Path, default=Path("outputs/reuse"), help="folder of all of it")
    parser.add_argument(
        "--source", help="asset: its folder or hub id; of report also its name, or its checksum's beginning"
    )
    parser.add_argument("--control", help="report: another source, of the same shapes, whose arms of new weights count")
    parser.add_argument("--packages", type=Path, help="folder of the packages that the tasks are drawn from")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--llms", nargs="+", choices=setting.LLMS, default=[setting.SMALL])
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--gemma", type=Path, help="folder of Gemma 3 270M")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--train", nargs="+", choices=setting.TRAIN[setting.SMALL], default=["tuned", "frozen"])
    parser.add_argument("--text", nargs="+", choices=TEXT, default=list(TEXT))
    parser.add_argument("--pairs", nargs="+", type=int, choices=PAIRS, default=[PAIRS[-1]], help="training pairs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help=f"by default {setting.STEPS}")
    parser.add_argument("--every", type=int, default=10, help="steps between validations")
    parser.add_argument("--questions", type=int, default=300, help="test questions that are answered")
    parser.add_argument("--pixels", type=int, default=setting.PIXELS, help="of every image")
    parser.add_argument("--set", nargs="+", default=[], help="overrides of the recipe, for example trainer.devices=1")
    parser.add_argument("--figures", type=Path, help="folder for the curves of report")
    parser.add_argument("--page", type=Path, help="page that the report is written into")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    if options.what != "report" and (options.source is None or options.packages is None):
        parser.error(f"{options.what} needs --source and --packages")
    {"probe": run_probes, "run": run_arms, "report": show}[options.what](options)


if __name__ == "__main__":
    main()
