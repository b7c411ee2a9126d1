"""What a trained pre-Buffer saves when it is attached to another language model.

    neo quickstart
    python benchmarks/reuse.py --root outputs/quickstart --arms random tuned frozen --seeds 0 1 2 --steps 150

attaches the quickstart's pre-Buffer to its second language model (another width, another tokenizer), once for each arm
and seed, and trains with the recipe quickstart/attach. Arms differ in the overrides below and in nothing else: data,
order, schedule and budget are the same. Printed for each: validation loss at the end, exact match on validation
questions, and the step at which its validation loss first was as low as the ``random`` arm's at the end.

``--task scenes`` trains on synthetic scenes (`neo data synth`), of which the source saw none: that shows transfer.
``--llm FOLDER`` takes another language model, of any family. Arms, seeds and steps may be any subset.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from neo_components.data.synth import write_scenes
from neo_components.recipe import load_recipe
from neo_components.training.run import train

FRESH = ["model.pre_buffer.reset=true", "stage.whiten_patches=20000"]
NONE = [
    "model.pre_buffer={depth: 0, from_pretrained: null}",
    "model.patch_embedding.width=256",
    "stage.whiten_patches=20000",
]
ARMS: dict[str, list[str]] = {
    "random": FRESH,
    "tuned": [],
    "frozen": ["stage.train=[bridge, post_llm]"],
    "bridges": ["stage.train=[bridge]"],
    "orthogonal": ["model.bridge=orthogonal"],
    "random_bridge": ["model.bridge=random"],
    "bypass": ["model.text=bypass"],
    "bypass_random": [*FRESH, "model.text=bypass"],
    "none": NONE,
}
"""Overrides of the recipe quickstart/attach."""
SCENES = 20_000, 400


@dataclass
class Run:
    """One arm with one seed: (step, validation loss), exact match at the end, seconds of training."""

    arm: str
    seed: int
    curve: list[tuple[int, float]] = field(default_factory=list)
    score: float = float("nan")
    seconds: float = 0.0

    def first_at(self, loss: float) -> int | None:
        """The first validated step with a loss that low."""
        return next((step for step, value in self.curve if value <= loss), None)


def shards(root: Path, task: str) -> tuple[Path, Path]:
    """Training and validation data."""
    if task == "easy_vqa":
        return root / "shards" / "train_all", root / "shards" / "validation"
    folders = root / "scenes" / "train", root / "scenes" / "validation"
    for seed, (folder, count) in enumerate(zip(folders, SCENES, strict=True)):
        if not folder.exists():
            write_scenes(folder, count, seed)
    return folders


def run(arm: str, seed: int, options: argparse.Namespace) -> Run:
    """Trains one arm and reads its curve back from the log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root, every = Path(options.root), max(1, options.steps // options.points)
    learn, validate = shards(root, options.task)
    output = Path(options.output) / f"{options.task}-{arm}-{seed}"
    overrides = [
        f"variables.root={root}", f"output={output}", f"seed={seed}", f"stage.steps={options.steps}",
        f"stage.warmup_steps={max(1, options.steps // 10)}", f"stage.validate_every={every}",
        f"stage.checkpoint_every={options.steps}", f"stage.predictions={options.questions}",
        f"data.train=[{{shards: {learn}}}]", f"data.validation=[{{shards: {validate}}}]",
        f"data.row_length={options.row_length}", "trainer.limit_val_batches=4",
    ]  # fmt: skip
    if options.llm:
        overrides += [f"model.post_llm.from_pretrained={options.llm}", f"data.tokenizer={options.llm}"]
    result = train(load_recipe("quickstart/attach", overrides + ARMS[arm]))
    log = EventAccumulator(str(output / "logs"))
    log.Reload()
    curve = [(event.step + 1, event.value) for event in log.Scalars("val/loss")]
    return Run(arm, seed, curve, result.scores[-1][2] if result.scores else float("nan"), result.seconds)


def table(runs: list[Run], steps: int) -> str:
    """One line for each arm: means over its seeds, and the spread."""
    goals = {r.seed: r.curve[-1][1] for r in runs if r.arm == "random"}
    lines = ["| arm | seeds | validation loss | exact match | steps to the loss of `random` | of its steps |"]
    lines.append("|---|---|---|---|---|---|")
    for arm in dict.fromkeys(r.arm for r in runs):
        some = [r for r in runs if r.arm == arm]
        loss, score = _spread([r.curve[-1][1] for r in some]), _spread([r.score for r in some])
        reached = [r.first_at(goals[r.seed]) for r in some if r.seed in goals]
        there = [step for step in reached if step is not None]
        when = f"{statistics.mean(there):.0f}" if there else "not reached"
        if there and len(there) < len(reached):
            when += f" ({len(reached) - len(there)} of {len(reached)} not reached)"
        share = f"{statistics.mean(there) / steps:.2f}" if there else ""
        lines.append(f"| {arm} | {len(some)} | {loss} | {score} | {when if reached else ''} | {share} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="outputs/quickstart", help="folder of `neo quickstart`")
    parser.add_argument("--output", default="outputs/reuse", help="folder of the runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["random", "tuned", "frozen"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--points", type=int, default=15, help="validations of a run")
    parser.add_argument("--questions", type=int, default=256, help="validation questions that are answered")
    parser.add_argument("--row-length", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--task", choices=["easy_vqa", "scenes"], default="easy_vqa")
    parser.add_argument("--llm", default="", help="language model folder; the quickstart's second one if empty")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    runs: list[Run] = []
    file = Path(options.output) / f"reuse-{options.task}.json"
    for seed in options.seeds:
        for arm in options.arms:
            runs.append(run(arm, seed, options))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([vars(r) for r in runs], indent=1) + "\n", encoding="utf-8")
            print(f"{arm} seed {seed}: loss {runs[-1].curve[-1][1]:.3f}  {runs[-1].seconds:.0f} s", flush=True)
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{options.task}, {options.steps} steps of {options.row_length} tokens, {device}\n")
    print(table(runs, options.steps))


if __name__ == "__main__":
    main()
