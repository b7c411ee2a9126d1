"""Fully sharded training (FSDP2) through Lightning's strategy; no process ever holds the full model.

Each block is one FSDP unit (``fully_shard``), and so are the patch embedding and, if the head is not tied, the word
embedding. The rest (head, final norm, boundary vectors, bridges) is one more unit. A process gathers a unit when it
computes with it. Gradients are averaged over all processes, as with DDP.

Source: Zhao et al. 2023 (arXiv 2304.11277); torch's ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from neo_components.model.chat import Chat
from neo_components.model.neo import NEO
from neo_components.recipe.stage import StageConfig
from neo_components.storage.deferred import Deferred, to_meta
from neo_components.storage.shards import full_tensor
from neo_components.storage.weight_writer import WeightWriter
from neo_components.training.fsdp2.checkpoints import read_sharded, write_sharded
from neo_components.training.module import NEOTraining

NAME = "fsdp2"
"""Its name in recipes: ``trainer.strategy: fsdp2``."""

PRECISIONS: dict[str, MixedPrecisionPolicy] = {
    "32-true": MixedPrecisionPolicy(cast_forward_inputs=False),
    # Inputs are not cast: rotary tables, inputs of a block, must stay float32.
    "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
}
"""``trainer.precision`` -> types of gathered weights and of gradient reduction. Shards and optimizer moments have the
model's own type."""


def policy_of(precision: str | int | None) -> MixedPrecisionPolicy:
    """The mixed-precision policy for a recipe's ``trainer.precision``.

    Raises:
        ValueError: if the strategy does not support that precision.
    """
    name = {"32": "32-true", "bf16": "bf16-mixed", "None": "32-true"}.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: {precision} is not supported by trainer.strategy={NAME}; use one of "
            f"{', '.join(PRECISIONS)} (model.dtype=bfloat16 stores weights and moments in bfloat16 too)"
        )
    return PRECISIONS[name]


def shard(model: NEO, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Shards a model on the meta device among the processes of a mesh, in place.

    Args:
        model: the model; its parameters are replaced.
        mesh: one-dimensional.
        policy: types of weights and gradients.
    """
    llm = model.post_llm
    units: list[nn.Module] = [*model.pre_buffer.layers, *llm.layers, model.patch_embedding]
    if llm.lm_head is not None:
        units.append(llm.word_embedding)
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for method in ("loss", "generate"):
        register_fsdp_forward_method(model, method)
    model.every_part = True


class ShardedTraining(NEOTraining):
    """Trains one stage with sharded weights.

    Args:
        model: built under ``deferred.Deferred``, on the meta device.
        stage: as in :class:`NEOTraining`.
        deferred: the ``Deferred`` under which it was built.
        policy: types of weights and gradients.

    Raises:
        ValueError: if the stage has an auxiliary loss, which reads word embeddings whole.
    """

    def __init__(self, model: NEO, stage: StageConfig, deferred: Deferred, policy: MixedPrecisionPolicy) -> None:
        if stage.word_alignment:
            raise ValueError(
                f"stage.word_alignment is {stage.word_alignment}, and the strategy fsdp2 has no whole word embeddings "
                "for it; set it to 0, or train with trainer.strategy=ddp or auto"
            )
        super().__init__(model, stage)
        self._deferred: Deferred | None = deferred
        self._policy = policy

    def configure_model(self) -> None:
        """Lightning's hook: shards the model and fills this process's shards."""
        if isinstance(self.model, FSDPModule):
            return
        assert self.device_mesh is not None
        assert self._deferred is not None
        mesh = self.device_mesh["data_parallel"]
        known = to_meta(self.model)
        shard(self.model, mesh, self._policy)
        self._deferred.materialize(self.model, self.trainer.strategy.root_device, known)
        self._deferred = None
        self.set_trainable()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As in :class:`NEOTraining`."""
        with plain_classes(self.model):
            super().on_save_checkpoint(checkpoint)

    def on_validation_end(self) -> None:
        """Reshards, as the weights may change before the next step (``stage.ema``)."""
        super().on_validation_end()
        reshard(self.model)


def reshard(model: nn.Module) -> None:
    """Frees gathered weights; the next use gathers them again."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def plain_classes(model: nn.Module) -> Iterator[None]:
    """Within it parts have their own classes again, by which registries name them; ``fully_shard`` derives others."""
    sharded = [(part, type(part)) for part in model.modules() if isinstance(part, FSDPModule)]
    for part, derived in sharded:
        part.__class__ = derived.__bases__[1]  # (FSDPModule, the part's own class)
    try:
        yield
    finally:
        for part, derived in sharded:
            part.__class__ = derived


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's model-parallel strategy with one data-parallel dimension and atomic sharded checkpoints."""

    def __init__(self) -> None:
        super().__init__()

    def setup_environment(self) -> None:
        """Shards the weights over all processes."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Every parameter by name, as this process's shard."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state by the names of its parameters, as this process's shards."""
        return named_state(self._names(), optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder with the shards of all processes and their common state."""
        write_sharded(checkpoint, Path(self.broadcast(str(filepath))), self)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this process's shards of model and optimizer, written by any number of processes."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        return read_sharded(path, self.lightning_module, self._names(), self.optimizers)

    def _names(self) -> dict[int, str]:
        assert self.lightning_module is not None
        return {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}


def named_state(names: Mapping[int, str], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state dict with names of parameters instead of numbers."""
    plain = getattr(optimizer, "optimizer", optimizer)
    state = {names[id(parameter)]: dict(values) for parameter, values in plain.state.items()}
    return {"state": state, "param_groups": plain.state_dict()["param_groups"]}


def refuse_unshardable(stage: StageConfig) -> None:
    """Refuses settings of a stage that sharded weights do not support.

    Raises:
        ValueError: with the reason and the alternatives.
    """
    if stage.optimizer == "muon":
        raise ValueError(
            f"stage.optimizer: muon orthogonalizes full matrices, which no process has with trainer.strategy={NAME}; "
            "use adamw, or trainer.strategy=ddp"
        )
    if stage.fp8 != "none":
        raise ValueError(
            f"stage.fp8: {stage.fp8} is not tested on sharded weights (trainer.strategy={NAME}); use none, or "
            "trainer.strategy=ddp"
        )
    if stage.offload != "none":
        raise ValueError(
            f"stage.offload: {stage.offload} is for full weights; trainer.strategy={NAME} shards the optimizer's state "
            "instead: use none, or trainer.strategy=ddp"
        )
    if stage.lora is not None:
        raise ValueError(
            f"stage.lora: adapters cannot be merged into sharded weights (trainer.strategy={NAME}); use "
            "trainer.strategy=ddp, or train groups of parameters without adapters"
        )


def save_sharded(chat: Chat, folder: Path, writes: bool) -> None:
    """Saves a sharded model as an ordinary model folder, weight by weight. Every process must call it.

    Args:
        chat: the model with tokenizer and image limits.
        folder: as ``chat.save_pretrained`` writes it; weights of more than ``LARGEST_FILE`` bytes in several files.
        writes: whether this process writes the files.
    """
    reshard(chat.model)
    writer = WeightWriter(folder) if writes else None
    for name, tensor in sorted(chat.model.state_dict().items()):
        full = full_tensor(tensor)
        if writer is not None:
            writer.add(name, full)
    if writer is not None:
        writer.close()
        with plain_classes(chat.model):
            chat.model.save_description(folder)
        chat.save_beside(folder)
