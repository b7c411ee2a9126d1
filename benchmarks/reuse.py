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
language models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import reuse_setting as setting
import torch
from lightning.pytorch.callbacks import Callback
from reuse_figure import draw
from reuse_probe import Probe, probe
from reuse_report import into_page, report
from reuse_tasks import PAIRS, TASKS, card_of, make_task, test_folder, train_folder

from neo_components.data.module import NEODataModule
from neo_components.evaluation import evaluate, questions_from_shards
from neo_components.recipe import Recipe, load_recipe
from neo_components.training.callbacks.visual_geometry import measured
from neo_components.training.start import start, whiten

WEIGHTS = {
    "random": ["model.pre_buffer.reset=true"],
    "whitened": ["model.pre_buffer.reset=true", "stage.whiten_patches=20000"],
    "reused": [],
}
TEXT = {"bypass": ["model.text=bypass"], "shared": ["model.text=shared"]}
GEOMETRY = ("visual/norm", "visual/mean_share", "visual/effective_rank", "words/norm")
"""Of the tokens that enter the language model (training/callbacks/visual_geometry.py)."""
SEED = 1000
"""Added to an arm's seed: no arm starts from the numbers that a source started from."""


@dataclass
class Arm:
    """One arm: (step, validation loss), (step, exact match by kind of question), geometry of visual tokens at the start
    and the end, CPU seconds with all of that.

    ``blind`` is the exact match of the most frequent answer to each question.
    """

    weights: str
    train: str
    text: str
    llm: str
    task: str
    source: str
    pairs: int
    seed: int
    steps: int
    device: str = ""
    blind: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    geometry: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    unexplained: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[Any, ...]:
        """What distinguishes it from other arms."""
        return tuple(asdict(self).values())[:9]


class Curve(Callback):
    """Keeps the validation losses and the geometry of the visual tokens, and answers the questions after some of the
    steps."""

    def __init__(self, ask: Callable[[], dict[str, float]], at: Container[int]) -> None:
        self.points: list[tuple[int, float]] = []
        self.scores: list[tuple[int, dict[str, float]]] = []
        self.geometry: list[tuple[int, dict[str, float]]] = []
        self.ask, self.at = ask, at
        self._hook: Any = None
        self._measured: list[float] = []

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, *which: int) -> None:
        """Watches what enters the language model in the first batch."""
        if batch_idx == 0:
            self._hook = module.model.post_llm.register_forward_pre_hook(self._measure, with_kwargs=True)

    def _measure(self, llm: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._measured = measured(arguments[0].float(), named["known"]).tolist()
        self._hook.remove()

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Adds one."""
        step = trainer.global_step
        self.points.append((step, round(float(trainer.callback_metrics["val/loss"]), 5)))
        geometry = {name: round(value, 4) for name, value in zip(GEOMETRY, self._measured, strict=True)}
        self.geometry = [*self.geometry[:1], (step, geometry)]
        if step in self.at:
            self.scores.append((step, self.ask()))


def recipe_of(arm: Arm, options: argparse.Namespace) -> Recipe:
    """The recipe of an arm."""
    root, llm = options.root, folder_of(arm.llm, options)
    return load_recipe(setting.RECIPES[arm.llm], [
        f"seed={SEED + arm.seed}", f"model.pre_buffer.from_pretrained={options.source}",
        f"model.post_llm.from_pretrained={llm}", f"data.tokenizer={llm}",
        f"data.train=[{{shards: {train_folder(root, arm.task, arm.pairs)}}}]",
        f"data.validation=[{{shards: {test_folder(root, arm.task)}}}]",
        f"stage.steps={arm.steps}", f"stage.validate_every={options.every}",
        f"data.min_pixels={options.pixels}", f"data.max_pixels={options.pixels}",
        *setting.COMMON, *setting.SCHEDULES[arm.llm],
        *WEIGHTS[arm.weights], f"stage.train={setting.TRAIN[arm.llm][arm.train]}", *TEXT[arm.text], *options.set,
    ])  # fmt: skip


def folder_of(llm: str, options: argparse.Namespace) -> Path:
    """Folder of a language model.

    Raises:
        ValueError: if it was not given.
    """
    folder: Path | None = options.root / "llm_small" if llm == setting.SMALL else getattr(options, llm)
    if folder is None:
        raise ValueError(f"language model {llm}: give its folder, --{llm} FOLDER")
    return folder


def train_arm(arm: Arm, options: argparse.Namespace) -> None:
    """Trains an arm and fills in what was measured."""
    began = time.process_time()
    recipe = recipe_of(arm, options)
    lightning.seed_everything(recipe.seed, verbose=False)
    chat, module = start(recipe)
    model = chat.model
    bridges = {"in": model.bridge_in, "out": model.bridge_out}
    arm.unexplained = {n: b.unexplained for n, b in bridges.items() if b is not None and b.unexplained is not None}
    if recipe.stage.whiten_patches:
        whiten(recipe, model)
    asked = list(itertools.islice(questions_from_shards(test_folder(options.root, arm.task)), options.questions))
    limits = {"min_pixels": options.pixels, "max_pixels": options.pixels, "max_new_tokens": 12, "batch_size": 150}

    def ask() -> dict[str, float]:
        with torch.autocast(module.device.type, torch.bfloat16):  # as in training; in less time
            found = evaluate(model, chat.tokenizer, asked, progress=None, **limits).accuracy
        return {kind: round(score, 4) for kind, score in found.items()}

    steps = steps_of(arm.llm, options)
    curve = Curve(ask, (steps // 2, steps, arm.steps) if arm.pairs == PAIRS[-1] else (steps,))
    trainer = lightning.Trainer(
        max_steps=arm.steps, val_check_interval=options.every, check_val_every_n_epoch=None, gradient_clip_val=1.0,
        num_sanity_val_steps=0, inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[curve],
        **recipe.trainer,
    )  # fmt: skip
    data = NEODataModule(**recipe.data)
    data.input_spec = model.input_spec
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    arm.curve, arm.scores, arm.seconds = curve.points, curve.scores, round(time.process_time() - began, 1)
    arm.geometry = curve.geometry
    arm.blind = round(card_of(options.root, arm.task)["blind"], 4)


def steps_of(llm: str, options: argparse.Namespace) -> int:
    """Steps of the arms of a language model, those of new weights aside."""
    return setting.STEPS[llm] if options.steps is None else int(options.steps)


def source_of(options: argparse.Namespace) -> str:
    """Name of the source in the results: without the folders above it."""
    return Path(options.source).name if Path(options.source).is_dir() else str(options.source)


def arms_of(options: argparse.Namespace) -> Iterator[Arm]:
    """The arms that a command line selects, seed by seed."""
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    choices = (options.seeds, options.llms, options.pairs, options.tasks, options.text, options.train, options.weights)
    for seed, llm, pairs, task, text, train, weights in itertools.product(*choices):
        longer = setting.LONGER if pairs == PAIRS[-1] and weights != "reused" else 1
        steps = steps_of(llm, options) * longer
        yield Arm(weights, train, text, llm, task, source_of(options), pairs, seed, steps, device)


def read(file: Path) -> list[Arm]:
    """The arms that are done."""
    if not file.is_file():
        return []
    return [Arm(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def read_probes(file: Path) -> list[Probe]:
    """The probes that are done."""
    if not file.is_file():
        return []
    return [Probe(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def add(file: Path, found: Arm | Probe) -> None:
    """Appends a line."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(found)) + "\n")


def run_probes(options: argparse.Namespace) -> None:
    """Makes the tasks that are missing, then fits the probes that are not done, of new weights with two seeds."""
    for task in options.tasks:
        make_task(options.root, task, options.packages)
    file, source = options.root / "probes.jsonl", source_of(options)
    for seed, task, weights in itertools.product(options.seeds[:2], options.tasks, options.weights):
        seed = 0 if weights == "reused" else seed
        if (source, weights, task, seed) not in {one.key for one in read_probes(file)}:
            for one in probe(options.root, options.source, source, weights, task, seed, options.pixels):
                add(file, one)
                print(f"{task}, {weights}, {one.features}: error {one.error:.3f}", flush=True)


def run_arms(options: argparse.Namespace) -> None:
    """Makes what is missing, then trains the arms that are not done."""
    for task in TASKS if setting.SMALL in options.llms else options.tasks:  # the small language model knows all texts
        make_task(options.root, task, options.packages)
    if setting.SMALL in options.llms:
        setting.make_small(options.root)
    file = options.root / "arms.jsonl"
    for arm in arms_of(options):
        if arm.key in {one.key for one in read(file)}:
            continue
        train_arm(arm, options)
        add(file, arm)
        last = f"loss {arm.curve[-1][1]:.3f}, exact match {arm.scores[-1][1]['overall']:.3f}, {arm.seconds:.0f} CPU s"
        name = f"{arm.task} on {arm.llm}, {arm.weights} {arm.train} {arm.text}, {arm.pairs} pairs, seed {arm.seed}"
        print(f"{name}: {last}", flush=True)


def with_control(some: list[Any], source: str, control: str | None) -> list[Any]:
    """The arms or probes of a source; those of new weights from another source of the same shapes, if one is named."""
    new = control or source
    found = [one for one in some if one.source == (source if one.weights == "reused" else new)]
    return [replace(one, source=source) for one in found]


def show(options: argparse.Namespace) -> None:
    """Prints the report; writes it into a page and draws the curves if asked to."""
    arms, probes = read(options.root / "arms.jsonl"), read_probes(options.root / "probes.jsonl")
    if options.source is not None:
        arms, probes = (with_control(some, source_of(options), options.control) for some in (arms, probes))
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
    parser.add_argument("--source", help="folder, hub id or pretrained:NAME of the asset")
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
