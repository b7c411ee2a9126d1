"""Context parallelism: the processes of a group compute one batch together, each a slice of every packed sequence.

Everything outside attention works on the tokens of the slice: embeddings, norms, feed-forwards, head and loss.
Attention is :class:`~neo_components.training.context_parallel.attention.HeadParallelAttention`. All processes of a
group read the same batches; data parallelism goes over the groups.

Source: DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from neo_components.components.block_inputs import Attend
from neo_components.components.stack import Prepared
from neo_components.components.token_loss import token_loss
from neo_components.model.neo import NEO
from neo_components.training.context_parallel.attention import HeadParallelAttention
from neo_components.training.context_parallel.slices import Slice
from neo_components.types import IGNORED, Batch, plain_layout


class ContextParallel:
    """Computes a model's loss in several processes.

    Args:
        group: the processes that hold the slices, in order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._compared = False

    @classmethod
    def of_size(cls, size: int) -> ContextParallel:
        """Cuts all processes into groups of ``size`` consecutive ones. Every process must call it.

        Raises:
            ValueError: if the number of processes is no multiple of ``size``.
        """
        check_processes(dist.get_world_size() if dist.is_initialized() else 1, size)
        return cls(dist.new_subgroups(size)[0])

    def __deepcopy__(self, memo: Any) -> ContextParallel:
        return self  # processes have no copies

    def apply(self, model: NEO) -> None:
        """From now on ``model.loss`` is :meth:`loss`. Logits and generation stay those of one process."""
        check_model(model, self.size)
        object.__setattr__(model, "loss", partial(self.loss, model))

    def loss(self, model: NEO, batch: Batch, nll: list[Tensor] | None = None) -> Tensor:
        """``NEO.loss`` of the full batch. Every process of the group must call it.

        The result is the same in every process. Each has its part of the gradient, of which the mean over the processes
        is the gradient of the loss: DDP and FSDP take that mean.

        Args:
            model: equal weights in every process, full or sharded.
            batch: the same full packed sequences in every process.
            nll: filled as ``NEO.loss`` does, with [n] float32 for the n target tokens of the full batch.

        Returns:
            Scalar float32.

        Raises:
            ValueError: if the length L is no multiple of the number of processes, or the first batches differ.
        """
        self._compare(batch)
        batch = batch.with_indices(batch.indices)  # found once
        mine, llm = Slice.of(batch, self.rank, self.size), model.post_llm
        hidden = model.hidden(mine.batch(batch, model.patch_embedding.fold), self.attends(model, batch))
        predicting = mine.predicting(batch)
        index = predicting.exact if hidden.device.type == "cpu" else predicting.filled  # as in NEO.loss
        labels, weights = mine.following(batch.labels, IGNORED), mine.following(batch.loss_weights, 0.0)
        state, target, weight = (x.flatten(0, 1).index_select(0, index) for x in (hidden, labels, weights))
        weight[predicting.count :] = 0.0
        own, each = token_loss(state, llm.head_weight, target.clamp(min=0), weight, llm.hparams.logits_divisor)
        of_slice = each.new_zeros(weights.numel()).index_copy(0, predicting.exact, each[: predicting.count])
        targets = batch.indices.targets.exact
        every = self._of_all(of_slice.view_as(weights)).flatten().index_select(0, targets - 1)
        if nll is not None:
            nll.append(every)
        weight = batch.loss_weights.flatten().index_select(0, targets)
        total = (every * weight).sum()  # a product of vectors would be rounded under autocast
        return _Sum.apply(own, total, self.size) / weight.sum().clamp(min=1e-5)

    def attends(self, model: NEO, batch: Batch) -> list[Attend]:
        """The attention of every block over slices of a batch; blocks that attend alike share it."""
        prepared: Prepared = {}
        where = (batch.document_ids, batch.image_ids, prepared, batch.token_kinds, batch.known)
        full = [*model.pre_buffer.prepare(*where), *model.post_llm.prepare(*where)]
        parallel = {id(attend): HeadParallelAttention(attend, self.group) for attend in full}
        return [parallel[id(attend)] for attend in full]

    def _compare(self, batch: Batch) -> None:
        """Refuses different batches in the processes of the group. Only the first ones are compared."""
        if self._compared:
            return
        ids = batch.token_ids
        index = torch.arange(1, ids.numel() + 1, device=ids.device)
        mine = torch.stack([index[-1], ((ids.flatten() + 1) * index).sum()])
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        if any(not torch.equal(mine, other) for other in found):
            raise ValueError(
                f"stage.context_parallel: the {self.size} processes of a group must read the same batches, and their "
                "first ones differ; train from NEODataModule, or let process RANK read the data of "
                f"RANK // {self.size}"
            )
        self._compared = True

    def _of_all(self, x: Tensor) -> Tensor:
        """[B, l] of this process -> [B, L] of all."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x, group=self.group)
        return torch.cat(found, dim=1)


class _Sum(torch.autograd.Function):
    """The sum over all processes, known already, of ``own``: the gradient of ``own`` is that of the sum, times the
    number of processes, as their mean will be taken."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor, size: int) -> Tensor:
        ctx.size = size
        return whole.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.size, None, None


def check_processes(processes: int, size: int) -> None:
    """Refuses groups that do not take all processes.

    Raises:
        ValueError: if the number of processes is no multiple of ``size``.
    """
    if processes % size:
        raise ValueError(
            f"stage.context_parallel: groups of {size} do not take all {processes} processes; set trainer.devices "
            f"(times trainer.num_nodes) to a multiple of {size}, or stage.context_parallel to one of "
            f"{_listed(divisors(processes))}"
        )


def check_model(model: NEO, size: int) -> None:
    """Refuses a model that ``size`` processes cannot compute together.

    Raises:
        ValueError: with the reason and the sizes that work.
    """
    if size == 1:
        return
    for name, stack in (("pre-Buffer", model.pre_buffer), ("post-LLM", model.post_llm)):
        for heads in sorted({block.hparams.num_heads for block in stack.blocks}):
            if heads % size:
                raise ValueError(
                    f"stage.context_parallel: {size} processes cannot share the {heads} query heads of the {name} "
                    f"evenly; choose one of {_listed(divisors(heads))}"
                )
    if not model.route.words_pass:
        raise ValueError(
            f"stage.context_parallel: with model.text={model.route.text} no slice has its share of the tokens that "
            "pass the pre-Buffer; set stage.context_parallel to 1, or use model.text=shared"
        )
    embedding = type(model.patch_embedding)
    # A class that derives from one which embeds each token alone may do otherwise, so each states it for itself.
    if not (vars(embedding).get("each_token_alone") and model.patch_embedding.image_layout is plain_layout):
        raise ValueError(
            f"stage.context_parallel: a {embedding.__name__} may need whole images, and a slice may have part of one; "
            "set stage.context_parallel to 1, or each_token_alone = True in the class of a patch embedding each of "
            "whose tokens depends on its own patches only"
        )


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
