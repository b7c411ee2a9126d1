"""Weights divided among processes: FSDP2 through Lightning's strategy, from models that are never whole anywhere.

Each block is divided by rows (``fully_shard``), so are the patch embedding and, where the head is a weight of its own,
the word embedding; what is left (head, final norm, boundary vectors, bridges) is one more part. A process gathers a
part when it computes with it. The gradient that it keeps of its rows is the mean over all processes, as under DDP.

Source: Zhao et al. 2023 (arXiv 2304.11277); torch's ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from neo_components.storage.deferred import Deferred, Source
from neo_components.storage.weight_writer import WeightWriter
from neo_components.training.fsdp2.checkpoints import read_sharded, write_sharded
from neo_components.training.fsdp2.tensors import local_of, rows_of, whole
from neo_components.training.module import NEOTraining

NAME = "fsdp2"
"""What a recipe calls it: ``trainer.strategy: fsdp2``."""

PRECISIONS: dict[str, MixedPrecisionPolicy] = {
    "32-true": MixedPrecisionPolicy(cast_forward_inputs=False),
    # Rotary tables are inputs of a block and stay float32, so inputs are not cast; the word embedding's type decides.
    "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
}
"""Types of the gathered weights and of the gradients' sum, by ``trainer.precision``. Each process keeps its rows, and
the optimizer its moments, in the model's own type."""


def policy_of(precision: Any) -> MixedPrecisionPolicy:
    """The types that belong to a recipe's ``trainer.precision``.

    Raises:
        ValueError: if weights cannot be divided in that precision.
    """
    name = {"32": "32-true", "bf16": "bf16-mixed", "None": "32-true"}.get(str(precision), str(precision))
    if name not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: {precision} does not go with trainer.strategy={NAME}; use one of "
            f"{', '.join(PRECISIONS)} (model.dtype=bfloat16 keeps weights and moments in bfloat16 too)"
        )
    return PRECISIONS[name]


def divide(model: NEO, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Divides a model on the meta device among the processes of a mesh, in place.

    Args:
        model: all of it; its parameters are replaced.
        mesh: of one dimension.
        policy: types of weights and gradients.
    """
    llm = model.post_llm
    parts: list[nn.Module] = [*model.pre_buffer.layers, *llm.layers, model.patch_embedding]
    if llm.lm_head is not None:
        parts.append(llm.word_embedding)
    for part in (*parts, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for method in ("loss", "generate"):
        register_fsdp_forward_method(model, method)
    model.every_part = True


@torch.no_grad()
def fill(model: NEO, sources: Mapping[str, Source], mesh: DeviceMesh, device: torch.device) -> None:
    """Gives every process its rows of a divided model; one weight at a time is made, of stored ones these rows alone.

    Args:
        model: divided, on the meta device.
        sources: where each parameter comes from.
        mesh: that it was divided on.
        device: where the rows go.
    """
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        local = local_of(parameter)
        start, stop = rows_of(parameter, mesh.get_local_rank(), mesh.size())
        if local.shape[0] != stop - start:
            raise RuntimeError(f"{name}: this process keeps {local.shape[0]} rows, expected {stop - start}")
        if stop > start:
            local.copy_(sources[name].rows(start, stop))


class ShardedTraining(NEOTraining):
    """Trains one stage with weights that are divided among the processes.

    Args:
        model: deferred (``deferred.Deferred``), on the meta device as far as it is not filled.
        stage: as in :class:`NEOTraining`.
        notes: that were taken when it was built.
        policy: types of weights and gradients.
    """

    def __init__(self, model: NEO, stage: StageConfig, notes: Deferred, policy: MixedPrecisionPolicy) -> None:
        super().__init__(model, stage)
        self._notes: Deferred | None = notes
        self._policy = policy

    def configure_model(self) -> None:
        """Lightning's hook: divides the model and gives each process its rows, once the processes know each other."""
        if isinstance(self.model, FSDPModule):
            return
        assert self.device_mesh is not None
        assert self._notes is not None
        mesh = self.device_mesh["data_parallel"]
        sources = self._notes.sources(self.model)
        divide(self.model.to("meta"), mesh, self._policy)
        fill(self.model, sources, mesh, self.trainer.strategy.root_device)
        self._notes = None
        self.choose_trained()

    def configure_optimizers(self) -> Any:
        """As ever, and all rows in few operations: torch does so by itself only where weights are whole."""
        configured = super().configure_optimizers()
        for group in configured["optimizer"].param_groups:
            group["foreach"] = True
        return configured

    def on_validation_end(self) -> None:
        """Lets go of what was gathered: the weights may change before the next step (``stage.ema``)."""
        super().on_validation_end()
        gathered_again(self.model)


def gathered_again(model: nn.Module) -> None:
    """Lets go of gathered weights, so that they are gathered anew when they are next needed."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for divided weights, over all processes, with checkpoints that are whole or not there."""

    def __init__(self) -> None:
        super().__init__()

    def setup_environment(self) -> None:
        """All processes divide the weights; none hold the same rows."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Every parameter as this process's rows, by name."""
        assert self.lightning_module is not None
        gathered_again(self.lightning_module)
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimizer's state as this process's rows, by the names of its parameters."""
        return named_state(self._names(), optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes a folder: the rows of each process, and what all have in common."""
        write_sharded(checkpoint, Path(self.broadcast(str(filepath))), self)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads this process's rows into model and optimizer, whatever the number of processes that wrote them."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        return read_sharded(path, self.lightning_module, self._names(), self.optimizers)

    def _names(self) -> dict[int, str]:
        assert self.lightning_module is not None
        return {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}


def named_state(names: Mapping[int, str], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state with its parameters' names in place of numbers; the groups as plain values."""
    plain = getattr(optimizer, "optimizer", optimizer)
    state = {names[id(parameter)]: dict(values) for parameter, values in plain.state.items()}
    return {"state": state, "param_groups": plain.state_dict()["param_groups"]}


def refuse_undividable(stage: StageConfig) -> None:
    """Refuses what a stage asks for and divided weights do not allow.

    Raises:
        ValueError: saying why, and what else there is.
    """
    if stage.optimizer == "muon":
        raise ValueError(
            f"stage.optimizer: muon turns whole matrices, which no process has under trainer.strategy={NAME}; use "
            "adamw, or trainer.strategy=ddp"
        )
    if stage.lora is not None:
        raise ValueError(
            f"stage.lora: the adapters cannot be merged into weights that are divided (trainer.strategy={NAME}); use "
            "trainer.strategy=ddp, or train the groups themselves"
        )


def save_divided(chat: Chat, folder: Path, writes: bool) -> None:
    """Puts a divided model together in its folder, weight by weight; every process calls it.

    Args:
        chat: the model with tokenizer and image limits.
        folder: what ``chat.save_pretrained`` would write; weights of more than ``LARGEST_FILE`` bytes in several files.
        writes: whether this process writes.
    """
    gathered_again(chat.model)
    writer = WeightWriter(folder) if writes else None
    for name, tensor in sorted(chat.model.state_dict().items()):
        all_rows = whole(tensor)
        if writer is not None:
            writer.add(name, all_rows)
    if writer is not None:
        writer.close()
        chat.model.save_description(folder)
        chat.save_beside(folder)
