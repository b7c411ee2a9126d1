"""What a trained pre-Buffer saves when it is attached to another language model.

    python benchmarks/reuse.py run --root outputs/reuse
    python benchmarks/reuse.py report --root outputs/reuse --figures docs/figures
    python benchmarks/reuse.py report --root benchmarks/results      # the arms of docs/results/reuse.md

``run`` makes two tasks, three language models and the trained sources (reuse_setting.py), then trains arm after arm.
Arms of one language model, task and seed differ in the line of ``ARMS`` and in nothing else: data, their order, batch
and schedule (warm-up, then constant) are the same. The random arms train longer, to show the loss that they reach. Each
seed has its own source, trained with language model ``a``; arms attach it to ``b`` or ``c``. With ``--source`` the
source was trained on another task than the arm: this measures transfer.

Every arm is one line of ``arms.jsonl`` when it is done, and one that is there already is not run again, so a run can
be stopped, continued, and shared by several processes with other arms, seeds or language models.

Measured: the validation loss every few steps on the same packed sequences, and exact match over the same validation
questions after the same number of steps. ``report`` prints how many steps an arm needs for the losses of the random arm
after parts of its steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import time
import warnings
from collections.abc import Callable, Container
from dataclasses import asdict, dataclass, field
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from reuse_report import GOALS, report, reuses_nothing
from reuse_setting import PIXELS, STEPS, TASKS, asset, common, make, shards

from neo_components.data import load_tokenizer
from neo_components.data.module import NEODataModule
from neo_components.evaluation import evaluate, questions_from_shards
from neo_components.recipe import Recipe, build, load_recipe
from neo_components.training.module import NEOTraining
from neo_components.training.start import whiten

NEW = ["model.pre_buffer.reset=true", "stage.whiten_patches=20000"]
OWN = [
    "model.pre_buffer={depth: 2, init_std: 0.09, from_pretrained: null}",
    "model.patch_embedding.width=192",
    "stage.whiten_patches=20000",
]
NONE = [
    "model.pre_buffer={depth: 0, from_pretrained: null}",
    "model.patch_embedding.width=192",
    "stage.whiten_patches=20000",
]
BYPASS = ["model.text=bypass"]
FIXED = ["stage.train=[bridge, post_llm]"]
ARMS: dict[str, list[str]] = {
    "random": NEW,
    "random bypass": NEW + BYPASS,
    "own": OWN,
    "none": NONE,
    "tuned": [],
    "tuned bypass": BYPASS,
    "frozen": FIXED,
    "frozen bypass": FIXED + BYPASS,
    "orthogonal": ["model.bridge=orthogonal"],
    "orthogonal bypass": ["model.bridge=orthogonal", *BYPASS],
    "random bridge": ["model.bridge=random"],
    "random bridge bypass": ["model.bridge=random", *BYPASS],
    "PB1": [],
    "PB2": [],
    "PB1 bypass": BYPASS,
    "PB2 bypass": BYPASS,
}
"""What an arm changes in recipe quickstart/attach, in which the pre-Buffer is reused, text passes it and all of
the model is trained. ``own`` is a new pre-Buffer of the language model's own width, without bridges; ``none`` leads
visual tokens and text straight into the language model."""
SCHEDULE = [
    "stage.train=[all]", "stage.optimizer=muon", "stage.lr=1.0e-3", "stage.muon_lr=0.01", "stage.min_lr_ratio=1.0",
    "stage.warmup_steps=10", "stage.checkpoint_every=0", "stage.predictions=0", "data.seq_len=1024",
]  # fmt: skip
SEED = 1000
"""Added to an arm's seed: no arm starts from the numbers that a source started from."""


@dataclass
class Arm:
    """One arm: (step, validation loss), (step, exact match by kind of question), seconds with all of that."""

    arm: str
    llm: str
    source: str
    task: str
    seed: int
    steps: int
    device: str = ""
    curve: list[tuple[int, float]] = field(default_factory=list)
    scores: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    unexplained: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, str, str, str, int, int]:
        """What distinguishes it from other arms."""
        return self.arm, self.llm, self.source, self.task, self.seed, self.steps


class Curve(Callback):
    """Keeps the validation losses, and answers the questions after some of the steps."""

    def __init__(self, ask: Callable[[], dict[str, float]], at: Container[int]) -> None:
        self.points: list[tuple[int, float]] = []
        self.scores: list[tuple[int, dict[str, float]]] = []
        self.ask, self.at = ask, at

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Adds one."""
        self.points.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))
        if trainer.global_step in self.at:
            self.scores.append((trainer.global_step, self.ask()))


def recipe_of(arm: Arm, root: Path, every: int) -> Recipe:
    """The recipe of an arm."""
    stage = int(arm.arm[2]) if arm.arm.startswith("PB") else None
    return load_recipe("quickstart/attach", [
        f"variables.root={root}", f"seed={SEED + arm.seed}", *common(root, arm.llm, arm.task),
        f"model.pre_buffer.from_pretrained={asset(root, arm.source, arm.seed, stage)}",
        f"model.post_llm.from_pretrained={root / f'llm_{arm.llm}'}",
        f"data.train=[{{shards: {shards(root, arm.task)[0]}}}]",
        f"stage.steps={arm.steps}", f"stage.validate_every={every}", *SCHEDULE, *ARMS[arm.arm],
    ])  # fmt: skip


def train_arm(arm: Arm, root: Path, options: argparse.Namespace) -> None:
    """Trains an arm and fills in what was measured."""
    recipe = recipe_of(arm, root, options.every)
    lightning.seed_everything(recipe.seed, verbose=False)
    model = build(recipe.model)
    bridges = {"in": model.bridge_in, "out": model.bridge_out}
    arm.unexplained = {n: b.unexplained for n, b in bridges.items() if b is not None and b.unexplained is not None}
    if recipe.stage.whiten_patches:
        whiten(recipe, model)
    asked = list(itertools.islice(questions_from_shards(shards(root, arm.task)[1]), options.questions))
    tokenizer = load_tokenizer(recipe.data["tokenizer"])

    def ask() -> dict[str, float]:
        limits = {"min_pixels": PIXELS, "max_pixels": PIXELS, "max_new_tokens": 8, "batch_size": 100}
        return evaluate(model, tokenizer, asked, progress=None, **limits).accuracy

    curve = Curve(ask, (options.steps, arm.steps))
    trainer = lightning.Trainer(
        max_steps=arm.steps, val_check_interval=options.every, check_val_every_n_epoch=None, gradient_clip_val=1.0,
        num_sanity_val_steps=0, inference_mode=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[curve],
        **recipe.trainer,
    )  # fmt: skip
    data = NEODataModule(**recipe.data)
    data.input_spec = model.input_spec
    module = NEOTraining(model, recipe.stage)
    began = time.monotonic()
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    arm.curve, arm.scores, arm.seconds = curve.points, curve.scores, time.monotonic() - began


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """The arms that a command line selects; arms that reuse nothing do not depend on the source and are run once."""
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    found = []
    for seed, llm, task, name in itertools.product(options.seeds, options.llms, options.tasks, options.arms):
        source = task if reuses_nothing(name) else options.source or task
        steps = options.random_steps if name in GOALS else options.steps
        found.append(Arm(name, llm, source, task, seed, steps, device))
    return found


def read(file: Path) -> list[Arm]:
    """The arms that are done."""
    if not file.is_file():
        return []
    return [Arm(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "report"])
    parser.add_argument("--root", type=Path, default=Path("outputs/reuse"), help="folder of all of it")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--llms", nargs="+", choices=["a", "b", "c"], default=["b", "c"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--source", choices=STEPS, help="task of the source; by default that of the arm")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--random-steps", type=int, default=320, help="steps of the random arms that set the goal")
    parser.add_argument("--every", type=int, default=5, help="steps between validations")
    parser.add_argument("--questions", type=int, default=200, help="validation questions that are answered")
    parser.add_argument("--figures", type=Path, help="folder for the curves of report")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    file = options.root / "arms.jsonl"
    if options.what == "report":
        print(report(read(file), options.figures))
        return
    sources = itertools.product([options.source] if options.source else options.tasks, options.seeds)
    make(options.root, sources)
    for arm in arms_of(options) if options.what == "run" else []:
        if arm.key in {done.key for done in read(file)}:
            continue
        train_arm(arm, options.root, options)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(arm)) + "\n")
        last = f"loss {arm.curve[-1][1]:.3f}, exact match {arm.scores[-1][1]['overall']:.3f}, {arm.seconds:.0f} s"
        print(f"{arm.arm} on {arm.llm}, {arm.source} to {arm.task}, seed {arm.seed}: {last}", flush=True)


if __name__ == "__main__":
    main()
