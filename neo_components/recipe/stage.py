"""A stage of training: what trains, for how long and how fast. The ``stage`` section of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Group = Literal[
    "patch_embedding",
    "pre_buffer",
    "post_llm",
    "post_llm.hw",
    "post_llm.word_embedding",
    "post_llm.head",
    "bridge",
    "all",
]
"""Groups of parameters that a stage may train: those of ``NEO.groups()``, and ``all``."""

LIMITS: dict[str, tuple[float, float]] = {
    "steps": (1, float("inf")),
    "lr": (0, float("inf")),
    "muon_lr": (0, float("inf")),
    "whiten_patches": (0, float("inf")),
    "min_lr_ratio": (0, 1),
    "ema": (0, 1),
    "recompute": (0, 1),
    "activation_gb": (0, float("inf")),
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
    """Low-rank adapters on the post-LLM's blocks, in place of training them whole (Hu et al. 2021, arXiv 2106.09685).

    Args:
        rank: of the change that a layer can learn.
        alpha: the change is ``alpha / rank`` times the product of the two factors.
        dropout: share of a layer's input that its adapter does not see in training.
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
        """What is wrong with the values of the section, by key. Values that are not there are not looked at."""
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
        name: what the stage is called in logs and reports.
        train: groups of parameters that learn; all others stay as they are.
        lora: low-rank adapters that learn beside these groups, on a post-LLM that stays as it is; merged into it at the
            end. ``None``: none.
        steps: optimizer steps.
        optimizer: ``adamw``, or ``muon``: Muon (Jordan et al. 2024; ``torch.optim.Muon``) for the weights of linear
            layers and AdamW for all else.
        lr: peak learning rate of AdamW.
        muon_lr: peak learning rate of Muon, where it is used.
        min_lr_ratio: where the cosine ends, as a fraction of the peak.
        warmup_steps: steps of linear rise to the peak before the cosine.
        betas: AdamW's decay rates of the two moments.
        eps: AdamW's term against division by zero.
        weight_decay: of either optimizer, on matrices only.
        validate_every: steps between validations, 0: never.
        checkpoint_every: steps between checkpoints, 0: none.
        log_every: steps between entries in the log.
        whiten_patches: patches of training images from which a new patch embedding is whitened before the first step
            (``PatchEmbedding.whiten``), 0: none. For a first stage; it forgets what the patch embedding has learnt.
        predictions: validation questions that are answered at each validation, and logged with their pictures.
        recompute: share of the blocks, from the first on, that are computed again in the backward pass instead of
            keeping what they computed: less memory for more time. The result is the same. ``auto``: the least share
            that fits the device's memory, or ``activation_gb``.
        activation_gb: GB (10^9 bytes) that the activations of a device's rows may take under ``recompute: auto``; 0:
            what the device's memory leaves.
        compile: compile every block in place (``torch.compile``). Meant for GPUs; the first steps take minutes,
            and rows of one length (``data.seq_len``) never make it compile again.
        ema: decay of an exponential average of the weights (for example 0.999), which validation, checkpoints and the
            trained model then use; 0: none.
        max_skipped_steps: a step whose gradient is not finite is skipped; so many in a row stop the run.

    Raises:
        ValueError: listing every number that is out of its range.
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
    predictions: int = 4
    recompute: float | Literal["auto"] = 0.0
    activation_gb: float = 0.0
    compile: bool = False
    ema: float = 0.0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        problems = self.problems(vars(self))
        if problems:
            raise ValueError("; ".join(f"stage.{key}: {text}" for key, text in problems.items()))

    @staticmethod
    def problems(values: Mapping[str, Any]) -> dict[str, str]:
        """What is wrong with the values of a stage, by key. Values that are not there are not looked at."""
        found = {}
        for key, (least, most) in LIMITS.items():
            if key == "recompute" and values.get(key) == "auto":
                continue
            if key in values and not (not isinstance(values[key], str) and least <= values[key] <= most):
                room = f"from {least} to {most}" if most < float("inf") else f"{least} or more"
                found[key] = f"got {values[key]}, must be {room}"
        lora, train = values.get("lora"), values.get("train")
        if train is not None and not train and lora is None:
            found["train"] = "is empty: name at least one group to train, or 'all'"
        if lora is not None and (whole := {"all", "post_llm"}.intersection(train or ())):
            found["train"] = (
                f"names {', '.join(sorted(whole))}, but stage.lora keeps the language model as it is; name "
                "patch_embedding, pre_buffer, bridge or parts like post_llm.hw, or take stage.lora away"
            )
        if not all(0 <= beta < 1 for beta in values.get("betas", ())):
            found["betas"] = f"got {list(values['betas'])}, both must be 0 or more and less than 1"
        if values.get("activation_gb") and values.get("recompute") != "auto":
            found["activation_gb"] = "says nothing without stage.recompute auto"
        steps, warmup = values.get("steps"), values.get("warmup_steps", 0)
        if steps is not None and warmup > steps:
            found["warmup_steps"] = f"got {warmup}, must not be more than stage.steps ({steps})"
        return found
