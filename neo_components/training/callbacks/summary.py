"""The summary of a run: its results, and where its files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from neo_components.training.callbacks.loggers import CSV, LOGS


@dataclass
class Summary:
    """Results of a run.

    Args:
        steps: of the optimizer, including those before the run was resumed.
        tokens: number of training tokens, without padding.
        images: number of training images.
        seconds: duration of this part of the run.
        losses: (step, seconds, training loss) of every step of this part.
        validations: (step, values by name) of every validation of this part.
        before: values by name, measured before the first step.
        metrics: last value of everything that was logged.
        metric: name of the metric that scored the validation questions.
    """

    steps: int = 0
    tokens: int = 0
    images: int = 0
    seconds: float = 0.0
    losses: Sequence[tuple[int, float, float]] = ()
    validations: Sequence[tuple[int, Mapping[str, float]]] = ()
    before: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    metric: str = "exact_match"

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of every line; values that were not measured are left out."""
        return [*self._quality(), *self._work()]

    def _quality(self) -> list[tuple[str, str]]:
        rows = []
        if self.losses:
            (first, _, loss), (last, _, now) = self.losses[0], self.losses[-1]
            rows.append(("training loss", f"{loss:.4f} at step {first}, {now:.4f} at step {last}"))
        for name, title in (("val/loss", "validation loss"), (f"val/{self.metric}", self.metric.replace("_", " "))):
            found = [(step, values[name]) for step, values in self.validations if name in values]
            if found:
                first_time = f"{found[0][1]:.4f} at step {found[0][0]}, " if len(found) > 1 else ""
                rows.append((title, f"{first_time}{found[-1][1]:.4f} at step {found[-1][0]}"))
        name = "val/text_perplexity"
        if name in self.metrics:
            before = f"{self.before[name]:.4g} before, " if name in self.before else ""
            alone = self.before.get(f"{name}_of_llm")
            beside = f" (original language model: {alone:.4g})" if alone is not None else ""
            rows.append(("text perplexity", f"{before}{self.metrics[name]:.4g} after{beside}"))
        drift = {name.removeprefix("drift/"): v for name, v in self.metrics.items() if name.startswith("drift/")}
        if drift:
            rows.append(("weight drift", ", ".join(f"{name} {100 * value:.2g} %" for name, value in drift.items())))
        return rows

    def _work(self) -> list[tuple[str, str]]:
        rows = [("steps", f"{self.steps:,}"), ("tokens", f"{self.tokens:,}"), ("images", f"{self.images:,}")]
        rows.append(("time", f"{self.seconds / 60:.1f} min" if self.seconds >= 60 else f"{self.seconds:.0f} s"))
        metrics = self.metrics
        if "perf/tokens_per_s" in metrics:
            rate = f"{metrics['perf/tokens_per_s']:,.0f} tokens/s, {metrics['perf/images_per_s']:,.1f} images/s"
            use = f", MFU {metrics['perf/mfu']:.1%}" if "perf/mfu" in metrics else ""
            rows.append(("final speed", f"{rate}{use}, waiting for data {metrics['perf/data_wait']:.0%}"))
        if "data/skipped" in metrics:
            reasons = {n.removeprefix("data/skipped_"): v for n, v in metrics.items() if n.startswith("data/skipped_")}
            why = f" ({', '.join(f'{name}: {count:.0f}' for name, count in reasons.items())})" if reasons else ""
            rows.append(("skipped samples", f"{metrics['data/skipped']:.0f}{why}"))
        if "train/skipped_steps" in metrics:
            rows.append(("skipped steps", f"{metrics['train/skipped_steps']:.0f}"))
        if "memory/process_gb" in metrics:
            device = f", device {metrics['memory/device_gb']:.2f} GB" if "memory/device_gb" in metrics else ""
            rows.append(("peak memory", f"process {metrics['memory/process_gb']:.2f} GB{device}"))
        return rows


def locations(output: Path) -> list[tuple[str, str]]:
    """The files and folders of a run: name and path of each."""
    outputs = {
        "model": output / "neo",
        "checkpoints": output / "checkpoints",
        "curves": output / LOGS,
        "metrics": output / LOGS / CSV,
        "figures": output / "figures",
        "recipe": output / "recipe.yaml",
    }
    hints = {"curves": f"   (tensorboard --logdir {output / LOGS})", "model": f'   (neo chat {output / "neo"} "...")'}
    return [(name, f"{path}{hints.get(name, '')}") for name, path in outputs.items() if path.exists()]


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns as plain text, aligned at the colon."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:>{width}s}: {value}" for name, value in rows)
