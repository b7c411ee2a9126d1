"""A stage of training: what trains, for how long and how fast. The ``stage`` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from neo_components.recipe.parts import Part
from neo_components.registry import METRICS, Choice, split

Group = Literal[
    "patch_embedding",
    "pre_buffer",
    "post_llm",
    "post_llm.hw",
    "post_llm.blocks",
    "post_llm.word_embedding",
    "post_llm.head",
    "visual_experts",
    "bridge",
    "all",
]
"""Groups of parameters that a stage may train: those of ``NEO.groups()``, and ``all``."""

METRIC = Part(METRICS, default="exact_match")

LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, float("inf")),
    "lr": (0, float("inf")),
    "muon_lr": (0, float("inf")),
    "whiten_patches": (0, float("inf")),
    "word_alignment": (0, float("inf")),
    "min_lr_ratio": (0, 1),
    "ema": (0, 1),
    "activation_checkpointing": (0, 1),
    "activation_gb": (0, float("inf")),
    "context_parallel": (1, float("inf")),
    "warmup_steps": (0, float("inf")),
    "eps": (0, float("inf")),
    "weight_decay": (0, float("inf")),
    "validate_every": (0, float("inf")),
    "checkpoint_every": (0, float("inf")),
    "log_every": (1, float("inf")),
    "predictions": (0, float("inf")),
    "max_skipped_steps": (1, float("inf")),
}
"""Least and greatest value of each number of a stage."""


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Names of the linear layers of a block that a language model brings along."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on the post-LLM's blocks, instead of full fine-tuning (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: of the update of each adapted weight.
        alpha: the update is ``alpha / rank`` times the product of the two factors.
        dropout: probability of dropping an element of an adapter's input in training.
        targets: names of the linear layers that are adapted, in every block.

    Raises:
        ValueError: listing every number that is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = LINEAR

    def __post_init__(self) -> None:
        if problems := self.problems(vars(self)):
            raise ValueError("; ".join(f"stage.lora.{key}: {text}" for key, text in problems.items()))

    @staticmethod
    def problems(values: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with the values of the section, by key. Missing values are not checked."""
        found = {}
        if values.get("rank", 1) < 1:
            found["rank"] = f"got {values['rank']}, must be 1 or more"
        if values.get("alpha", 1) <= 0:
            found["alpha"] = f"got {values['alpha']}, must be positive"
        if not 0 <= values.get("dropout", 0) < 1:
            found["dropout"] = f"got {values['dropout']}, must be 0 or more and less than 1"
        if "targets" in values and not values["targets"]:
            found["targets"] = f"is empty: name at least one of {', '.join(LINEAR)}"
        return found


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage.

    Args:
        name: of the stage in logs and reports.
        train: groups of parameters that train; all others are frozen.
        lora: low-rank adapters on the blocks of a frozen post-LLM, trained beside these groups and merged at the end.
            ``None``: none.
        steps: optimizer steps.
        optimizer: ``adamw``, or ``muon``: Muon (Jordan et al. 2024; ``torch.optim.Muon``) for the weights of linear
            layers and AdamW for everything else.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, if it is used.
        min_lr_ratio: learning rate at the end of the cosine, as a fraction of the peak.
        warmup_steps: steps of linear warm-up to the peak before the cosine.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's term against division by zero.
        weight_decay: of both optimizers, on matrices only.
        validate_every: steps between validations, 0: never.
        checkpoint_every: steps between checkpoints, 0: none.
        log_every: steps between entries in the log.
        whiten_patches: number of patches of training images by which a new patch embedding is whitened before the first
            step (``PatchEmbedding.whiten``), 0: none. Only for a first stage: it replaces the patch embedding's
            weights.
        word_alignment: weight of an auxiliary loss that draws visual tokens, as they enter the language model, to the
            word embeddings of their document's answers (``training/word_alignment.py``); 0: none.
        predictions: number of validation questions that the model answers at each validation; scores and figures are
            logged.
        metric: metric of these answers: a registered name, or a mapping of ``kind`` (the name) and its options.
        activation_checkpointing: fraction of the blocks, from the first on, that keep only their input and are computed
            again in the backward pass: less memory, more time, the same result. ``auto``: the smallest fraction that
            fits the device's memory, or ``activation_gb``.
        checkpoint_keeps: what a checkpointed block keeps: its ``input`` alone, or also the results of its matrix
            ``products``, so that only norms, rotations, gates and some kinds of attention are recomputed.
        activation_gb: GB (10^9 bytes) that the activations of a micro-batch may take under ``activation_checkpointing:
            auto``; 0: what the device's memory leaves.
        context_parallel: number of processes that compute each batch together, each of them a slice of every packed
            sequence and some heads of its attention (Jacobs et al. 2023, arXiv 2309.14509); 1: each process computes
            batches of its own. It must divide ``data.seq_len``, the number of query heads, and that of processes.
        compile: compile every block in place (``torch.compile``). Meant for GPUs. The first steps take minutes; packed
            sequences of one length (``data.seq_len``) avoid recompilation.
        kernels: norms and gates: ``plain``; ``liger``, by the Triton kernels of the package liger-kernel; or ``auto``,
            by these where they are installed, on a GPU, for blocks that are not compiled.
        fp8: products of the blocks' trained linear layers in float8 by torchao: ``none``; ``linears``, on a GPU that
            has it; or ``emulated``, rounded alike on any device, to see the effect on the loss.
        offload: ``none``, or ``optimizer``: the optimizer's state lies in the CPU's memory and visits the device one
            weight at a time. It saves two numbers a weight (AdamW) for two copies of them a step.
        ema: decay of an exponential moving average of the weights (for example 0.999), which validation, checkpoints
            and the trained model use; 0: none.
        max_skipped_steps: a step with a gradient that is not finite is skipped; this many consecutive ones stop the
            run.

    Raises:
        ValueError: listing every value that is not possible.
    """

    name: str = "stage"
    train: tuple[Group, ...]
    lora: LoRA | None = None
    steps: int = 1000
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 8e-4
    muon_lr: float = 0.02
    min_lr_ratio: float = 0.05
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.01
    validate_every: int = 200
    checkpoint_every: int = 500
    log_every: int = 10
    whiten_patches: int = 0
    word_alignment: float = 0.0
    predictions: int = 4
    metric: Annotated[Choice, METRIC] = METRIC.default
    activation_checkpointing: float | Literal["auto"] = 0.0
    checkpoint_keeps: Literal["input", "products"] = "input"
    activation_gb: float = 0.0
    context_parallel: int = 1
    compile: bool = False
    fp8: Literal["none", "linears", "emulated"] = "none"
    kernels: Literal["auto", "plain", "liger"] = "plain"
    offload: Literal["none", "optimizer"] = "none"
    ema: float = 0.0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        problems = self.problems(vars(self))
        if problems:
            raise ValueError("; ".join(f"stage.{key}: {text}" for key, text in problems.items()))
        object.__setattr__(self, "metric", METRICS.complete(self.metric))

    @property
    def metric_name(self) -> str:
        """Name of the metric without its options."""
        return split(self.metric)[0]

    @staticmethod
    def problems(values: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with the values of a stage, by key. Missing values are not checked."""
        found = {}
        for key, (least, most) in LIMITS.items():
            if key == "activation_checkpointing" and values.get(key) == "auto":
                continue
            if key in values and not (not isinstance(values[key], str) and least <= values[key] <= most):
                room = f"from {least} to {most}" if most < float("inf") else f"{least} or more"
                found[key] = f"got {values[key]}, must be {room}"
        lora, train = values.get("lora"), values.get("train")
        if train is not None and not train and lora is None:
            found["train"] = "is empty: name at least one group to train, or 'all'"
        if lora is not None and (full := {"all", "post_llm", "post_llm.blocks"}.intersection(train or ())):
            found["train"] = (
                f"names {', '.join(sorted(full))}, but stage.lora freezes the language model; name "
                "patch_embedding, pre_buffer, bridge or parts like post_llm.hw, or remove stage.lora"
            )
        if not all(0 <= beta < 1 for beta in values.get("betas", ())):
            found["betas"] = f"got {list(values['betas'])}, both must be 0 or more and less than 1"
        if values.get("word_alignment") and values.get("context_parallel", 1) > 1:
            found["word_alignment"] = "needs whole sequences: remove it, or set stage.context_parallel to 1"
        if values.get("activation_gb") and values.get("activation_checkpointing") != "auto":
            found["activation_gb"] = "has no effect without stage.activation_checkpointing auto"
        if values.get("fp8", "none") != "none" and lora is not None:
            found["fp8"] = f"got {values['fp8']}, which has no form beside stage.lora; use none, or remove stage.lora"
        if values.get("kernels") == "liger" and values.get("compile"):
            found["kernels"] = (
                "got liger, but compiled blocks fuse norms and gates themselves; remove it or stage.compile"
            )
        if values.get("checkpoint_keeps") == "products" and values.get("compile"):
            found["checkpoint_keeps"] = (
                "products is for blocks that are not compiled; remove stage.compile, or keep input"
            )
        if values.get("checkpoint_keeps") == "products" and not values.get("activation_checkpointing"):
            found["checkpoint_keeps"] = (
                "products has no effect at stage.activation_checkpointing 0; set that to 1.0 or auto, or keep input"
            )
        steps, warmup = values.get("steps"), values.get("warmup_steps", 0)
        if steps is not None and warmup > steps:
            found["warmup_steps"] = f"got {warmup}, must not be more than stage.steps ({steps})"
        return found
