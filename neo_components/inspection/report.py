"""Parameters, FLOPs, memory and hours of a recipe's run, computed from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from neo_components.estimate.activations import kept_activations
from neo_components.estimate.assumed import Document, assumed_batch
from neo_components.estimate.flops import Flops, step_flops
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import Setting
from neo_components.inspection.shape import empty_model
from neo_components.model.neo import NEO
from neo_components.recipe import Recipe
from neo_components.recipe.stage import StageConfig
from neo_components.training.activation_checkpointing import blocks_of, resolve_auto
from neo_components.training.lora import check_targets, set_trainable
from neo_components.training.optimizers import hidden_matrices
from neo_components.training.placement import accumulates, device_memory, plan_of, setting_of
from neo_components.training.trainer import check_strategy


@dataclass(frozen=True)
class Assumed:
    """Assumptions beyond the recipe.

    Args:
        visual: visual tokens per document; ``None``: those of a square image in the middle of the recipe's pixel range.
        text: text tokens per document.
        strategy: ``single``, ``ddp``, ``fsdp2``; ``None``: the recipe's.
        devices: total number; ``None``: the recipe's.
        device_memory: GB (10^9 bytes) of one device; ``None``: this machine's.
        tflops: peak TFLOP/s of a device, for the hours.
        mfu: model FLOPs utilization, for the hours.
    """

    visual: int | None = None
    text: int = 128
    strategy: str | None = None
    devices: int | None = None
    device_memory: float | None = None
    tflops: float = 312.0
    mfu: float = 0.4


@dataclass(frozen=True)
class Report:
    """The estimate of a run.

    Args:
        recipe: the file.
        groups: group -> (number of parameters, number of trainable parameters).
        total: the same for the full model, each parameter counted once.
        assumptions: assumptions and settings by name.
        flops: per step of all devices, by part.
        tokens: per step of all devices.
        memory: bytes on one device by kind, each at its own peak; empty without a stage.
        peak: peak bytes on one device.
        device_memory: bytes of one device; ``None`` if unknown.
        hours: of all steps at the assumed utilization; ``None`` without a stage.
        notes: remarks.
        warnings: reasons why the run may not work.
    """

    recipe: str
    groups: dict[str, tuple[int, int]]
    total: tuple[int, int]
    assumptions: dict[str, Any] = field(default_factory=dict)
    flops: dict[str, Flops] = field(default_factory=dict)
    tokens: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    device_memory: int | None = None
    hours: float | None = None
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inspect_recipe(recipe: Recipe, assumed: Assumed | None = None, overrides: Sequence[str] = ()) -> Report:
    """Estimates a run; loads and allocates no weights.

    Args:
        recipe: from ``load_recipe``; without stage or data only parameters are reported.
        assumed: further assumptions.
        overrides: those of ``load_recipe``.

    Raises:
        FileNotFoundError: if the shape of its model is unknown.
        ValueError: if the recipe is not possible.
    """
    assumed = assumed or Assumed()
    model, notes = empty_model(recipe, overrides)
    model.train()
    if recipe.given_stage is not None and recipe.given_stage.lora is not None:
        check_targets(model, recipe.given_stage.lora)
    if recipe.given_stage is None or recipe.given_data is None:
        model.requires_grad_(recipe.given_stage is None)
        groups, total = _parameters(model)
        return Report(str(recipe.path), groups, total, notes=[*notes, "no stage and data: parameters only"])
    set_trainable(model, recipe.stage)
    groups, total = _parameters(model)
    plan = plan_of(recipe, assumed.strategy, assumed.devices)
    setting = setting_of(recipe, plan)
    document, described = document_of(recipe, model, assumed)
    batch = assumed_batch(model, document, recipe.data["micro_batch_size"], recipe.data["seq_len"])
    memory_limit, source = device_memory(setting.device)
    if assumed.device_memory is not None:
        memory_limit, source = int(assumed.device_memory * 1e9), "given"
    stage, doubts = _resolved(recipe, model, setting, memory_limit, plan)
    for stack in (model.pre_buffer, model.post_llm):
        stack.checkpointed_blocks = blocks_of(float(stage.activation_checkpointing), len(stack.layers))
        stack.checkpoint_keeps = stage.checkpoint_keeps
    memory = step_memory(
        model, batch, setting, plan, kept_activations(model, batch, setting),
        hidden_matrices(model) if stage.optimizer == "muon" else (), bool(stage.ema),
        accumulates(recipe), stage.offload == "optimizer",
    )  # fmt: skip
    batches = plan.groups * int(recipe.trainer.get("accumulate_grad_batches") or 1)
    flops = {part: _times(one, batches) for part, one in step_flops(model, batch).items()}
    used = sum(part.model + part.again for part in flops.values())
    hours = used * stage.steps / (plan.devices * assumed.tflops * 1e12 * assumed.mfu) / 3600
    assumptions = described | {
        "micro-batch": f"{recipe.data['micro_batch_size']} packed sequences of {recipe.data['seq_len']} tokens on a "
        f"{_reader(plan)}, {batches} micro-batches a step",
        "strategy": f"{plan.strategy}, {plan.devices} devices",
        "precision": str(recipe.trainer.get("precision") or "32-true"),
        "device": setting.device,
        "activation checkpointing": " + ".join(
            str(stack.checkpointed_blocks) for stack in (model.pre_buffer, model.post_llm)
        )
        + " blocks",
        "hours": f"{assumed.mfu:.0%} of {assumed.tflops:g} TFLOP/s a device, {stage.steps} steps",
        "device memory": source,
    }
    report = Report(
        str(recipe.path), groups, total, assumptions, flops, batches * batch.token_ids.numel(), memory.kinds,
        memory.peak, memory_limit, hours, notes,
    )  # fmt: skip
    notes += [*doubts.notes, *_smaller_step(recipe, plan, report)]
    return replace(report, notes=notes, warnings=[*_refused(recipe), *(doubts.warnings or _warnings(report))])


def _reader(plan: Plan) -> str:
    return "device" if plan.context_parallel == 1 else f"group of {plan.context_parallel} devices"


def _smaller_step(recipe: Recipe, plan: Plan, report: Report) -> list[str]:
    """A note if the number of devices differs from the recipe's, which changes the size of a step."""
    own = plan_of(recipe).devices
    if own == plan.devices or report.hours is None:
        return []
    tokens, times = report.tokens * own // plan.devices, own / plan.devices
    return [
        f"a step has {report.tokens:,} tokens here and {tokens:,} on the recipe's own {own} devices; the same step "
        f"needs {times:g} times trainer.accumulate_grad_batches and {report.hours * times:,.1f} hours"
    ]


def _refused(recipe: Recipe) -> list[str]:
    """Why ``neo train`` would refuse the recipe."""
    try:
        check_strategy(recipe)
    except ValueError as error:
        return [f"neo train refuses this: {error}"]
    return []


@dataclass(frozen=True)
class _Doubts:
    """Remarks if ``activation_checkpointing: auto`` cannot be resolved."""

    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def _resolved(
    recipe: Recipe, model: NEO, setting: Setting, device_memory: int | None, plan: Plan
) -> tuple[StageConfig, _Doubts]:
    """The stage as it would run; if it would not run, a stage to estimate instead, and the reason."""
    stage = recipe.stage
    if stage.activation_checkpointing == "auto" and not stage.activation_gb and device_memory is None:
        note = (
            "stage.activation_checkpointing auto: estimated without it, as the device's memory is unknown; give "
            "--device-memory"
        )
        return replace(stage, activation_checkpointing=0.0), _Doubts(notes=(note,))
    try:
        return resolve_auto(stage, model, recipe.data, setting, device_memory, plan, accumulates(recipe)), _Doubts()
    except ValueError as error:
        return replace(stage, activation_checkpointing=1.0, activation_gb=0.0), _Doubts(warnings=(str(error),))


def _warnings(report: Report) -> list[str]:
    need, have = report.peak, report.device_memory
    if have is None:
        return []
    ways = (
        "lower data.micro_batch_size or data.seq_len, raise stage.activation_checkpointing, or shard the weights "
        "(fsdp2) over more devices"
    )
    if need > have:
        return [f"will not fit: {need / 1e9:.1f} GB on a device of {have / 1e9:.1f} GB; {ways}"]
    if need > 0.9 * have:
        return [f"will be tight: {need / 1e9:.1f} GB on a device of {have / 1e9:.1f} GB, driver not counted; {ways}"]
    return []


def _parameters(model: NEO) -> tuple[dict[str, tuple[int, int]], tuple[int, int]]:
    def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
        listed = list(parameters)
        return sum(p.numel() for p in listed), sum(p.numel() for p in listed if p.requires_grad)

    return {name: count(group) for name, group in model.groups().items()}, count(model.parameters())


def _times(one: Flops, times: int) -> Flops:
    return Flops(one.forward * times, one.backward * times, one.again * times)


def document_of(recipe: Recipe, model: NEO, assumed: Assumed) -> tuple[Document, dict[str, str]]:
    """The assumed document, and its description."""
    data, spec = recipe.data, model.input_spec
    longest = min(data["seq_len"], data["max_length"] or data["seq_len"])
    visual = assumed.visual
    how = "given"
    if visual is None:
        side = (data["min_pixels"] ** 0.5 + data["max_pixels"] ** 0.5) / 2
        visual = Document.of_length(longest, spec, assumed.text, round(side / spec.factor) ** 2).visual
        how = f"a square image in the middle of {data['min_pixels']} to {data['max_pixels']} pixels"
    document = Document(visual, min(assumed.text, longest))
    added = len(document.image(spec)) - visual
    text = f"{document.length(spec)} tokens: {visual} visual ({how}), " + (f"{added} added to them, " if added else "")
    text += f"{document.text} text, half of them target tokens"
    return document, {"document": text}
