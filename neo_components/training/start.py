"""The start of a run: model, training module (full or sharded), and the checkpoint to resume from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from neo_components.data import load_tokenizer
from neo_components.data.module import NEODataModule
from neo_components.model.chat import Chat
from neo_components.model.layouts import own_config
from neo_components.model.neo import NEO
from neo_components.recipe import Recipe, build, load_recipe
from neo_components.recipe.stage import StageConfig
from neo_components.storage.deferred import Deferred
from neo_components.training.activation_checkpointing import blocks_of, resolve_auto
from neo_components.training.checkpoints import newest_checkpoint, read_checkpoint
from neo_components.training.fsdp2.checkpoints import is_sharded
from neo_components.training.fsdp2.strategy import NAME, ShardedTraining, policy_of
from neo_components.training.module import NEOTraining
from neo_components.training.placement import accumulates, device_memory, plan_of, setting_of
from neo_components.training.trainer import check_strategy, strategy_of

log = logging.getLogger(__name__)


def start(recipe: Recipe) -> tuple[Chat, NEOTraining]:
    """The model that the stage starts from, with tokenizer and image limits, and its training module.

    Raises:
        ValueError: if parts of the recipe do not fit the model or the strategy.
    """
    check_strategy(recipe)
    return _start_sharded(recipe) if strategy_of(recipe) == NAME else _start_full(recipe)


def _start_full(recipe: Recipe) -> tuple[Chat, NEOTraining]:
    chat = _chat(recipe)
    return chat, NEOTraining(chat.model, _resolved(recipe, chat.model))


def _start_sharded(recipe: Recipe) -> tuple[Chat, NEOTraining]:
    """Builds the model on the meta device; the shards are known once all processes have started."""
    policy = policy_of(recipe.trainer.get("precision", "32-true"))
    with Deferred() as deferred:
        chat = _chat(recipe)
        if recipe.stage.whiten_patches:
            deferred.fill(chat.model.patch_embedding)
    return chat, ShardedTraining(chat.model, _resolved(recipe, chat.model), deferred, policy)


def _chat(recipe: Recipe) -> Chat:
    data = recipe.data
    tokenizer = load_tokenizer(data["tokenizer"], data["chat_template"])
    return Chat(build(recipe.model), tokenizer, data["min_pixels"], data["max_pixels"])


def _resolved(recipe: Recipe, model: NEO) -> StageConfig:
    """The stage with ``activation_checkpointing: auto`` resolved to the smallest fraction that fits."""
    if recipe.stage.activation_checkpointing != "auto":
        return recipe.stage
    plan = plan_of(recipe)
    setting = setting_of(recipe, plan)
    stage = resolve_auto(
        recipe.stage, model, recipe.data, setting, device_memory(setting.device)[0], plan, accumulates(recipe)
    )
    depths = len(model.pre_buffer.layers), len(model.post_llm.layers)
    counts = " + ".join(f"{blocks_of(float(stage.activation_checkpointing), depth)} of {depth}" for depth in depths)
    log.info("stage.activation_checkpointing auto: %s, %s blocks", stage.activation_checkpointing, counts)
    return stage


def whiten(recipe: Recipe, model: NEO) -> None:
    """Whitens the patch embedding by the first training images, the same ones on every rank."""
    data = NEODataModule(**(recipe.data | {"workers": 0}))
    data.input_spec = model.input_spec
    data.setup()
    patches: list[Tensor] = []
    for batch in data.train_dataloader():
        patches.append(batch.patches)
        if sum(map(len, patches)) >= recipe.stage.whiten_patches:
            break
    embedding: Any = model.patch_embedding
    if not hasattr(embedding, "whiten"):
        raise ValueError(
            f"stage.whiten_patches: a {type(embedding).__name__} has no method whiten(patches); take the key away"
        )
    device = next(embedding.parameters()).device
    embedding.whiten(torch.cat(patches)[: recipe.stage.whiten_patches].to(device))


def refuse_changes(recipe: Recipe, checkpoint: Path) -> None:
    """Refuses a recipe whose optimizer settings differ from the checkpoint's, which would silently win.

    Args:
        recipe: of the resumed run.
        checkpoint: in ``checkpoints`` of the run's folder; the ``recipe.yaml`` there has the original settings.

    Raises:
        ValueError: if a setting differs.
    """
    kept = checkpoint.parent.parent / "recipe.yaml"
    if not kept.is_file():
        return
    before, now = load_recipe(kept).stage, recipe.stage
    changed = [
        f"stage.{name} is {getattr(now, name)}, and was {getattr(before, name)}"
        for name in ("optimizer", "lr", "muon_lr", "betas", "eps", "weight_decay")
        if getattr(before, name) != getattr(now, name)
    ]
    if changed:
        raise ValueError(
            f"{'; '.join(changed)}: a resumed run goes on with the optimizer of {checkpoint}. Change it back, or start "
            "a new run from the weights with model.from_pretrained"
        )


def _other_arguments(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Arguments of the model's parts that differ from those in a checkpoint, though the tensors may not."""
    found = []
    for part in ("patch_embedding", "pre_buffer", "post_llm", "bridge_in", "bridge_out"):
        old, new = before.get(part) or {}, now[part] or {}
        names = sorted(old.keys() & new) if before else []
        found += [f"{part}.{n} is {new[n]!r}, and was {old[n]!r}" for n in names if n != "source" and old[n] != new[n]]
    return found


def checkpoint_of(output: Path, resume: str | Path | None, module: NEOTraining) -> tuple[Path | None, int]:
    """The checkpoint to resume from (``None``: none) and its number of steps.

    Rank 0 alone compares the checksums of sharded checkpoints.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is damaged, finished, or of another model or strategy; nothing has been written then.
    """
    if resume is None or (str(resume) == "auto" and not any((output / "checkpoints").glob("*.ckpt"))):
        return None, 0
    thorough = getattr(rank_zero_only, "rank", 0) == 0  # set before Lightning has started
    newest = str(resume) in ("last", "auto")
    path = newest_checkpoint(output / "checkpoints", thorough) if newest else Path(resume)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path} to resume from; start without --resume")
    if is_sharded(path) != isinstance(module, ShardedTraining):
        kind, way = ("sharded", f"trainer.strategy={NAME}") if is_sharded(path) else ("full", "the strategy of its run")
        raise ValueError(f"{path} is a {kind} checkpoint; resume with {way}, on any number of processes")
    saved = read_checkpoint(path, thorough)
    stored = {name: tensor.shape for name, tensor in saved["state_dict"].items()}
    done = int(saved["global_step"])
    if done >= module.stage.steps:
        raise ValueError(f"{path} has {done} steps already, stage.steps is {module.stage.steps}: raise it to go on")
    if changed := _other_arguments(
        json.loads(saved.get("model", "{}")), json.loads(json.dumps(own_config(module.model)))
    ):
        raise ValueError(f"{path} is of another model: {'; '.join(changed)}; resume with the recipe of its run")
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    differ = [name for name in sorted(stored.keys() | wanted) if stored.get(name) != wanted.get(name)]
    if differ:
        some = ", ".join(differ[:3])
        raise ValueError(
            f"{path} is of another model: {len(differ)} tensors differ ({some} ...); resume with the recipe of its run"
        )
    return path, done
