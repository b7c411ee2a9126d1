"""Text perplexity before the first step, of the stage's initial model and of its language model alone."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from neo_components.components.patch_embeddings.neo import PatchEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.data.module import NEODataModule
from neo_components.model.neo import NEO
from neo_components.training.callbacks.loggers import log_once
from neo_components.training.module import NEOTraining, mean_nll


def language_model_alone(llm: PostLLM) -> NEO:
    """A NEO with an empty pre-Buffer around a language model, for text only."""
    h = llm.hparams
    empty = PreBuffer(
        0, hidden_size=h.hidden_size, num_heads=h.num_heads, num_kv_heads=h.num_kv_heads, head_width=h.head_width,
        feed_forward_size=h.feed_forward_size, rope=h.rope, attention=h.attention, backend=llm.backend,
    )  # fmt: skip
    weight = llm.word_embedding.weight
    unused = PatchEmbedding(h.hidden_size, width=4)
    return NEO(unused.to(weight.device, weight.dtype), empty.to(weight.device, weight.dtype), llm)


class InitialTextPerplexity(Callback):
    """Logs ``val/text_perplexity`` at step 0, and ``val/text_perplexity_of_llm`` of the original language model.

    ``NEOTraining`` logs the perplexity of later validations. If text passes through a new pre-Buffer, it starts far
    above the perplexity of the language model alone and should return to it.

    Args:
        data: data module with held-out text.
        alone: whether to measure the language model alone; meaningful only before it was trained with a pre-Buffer.
    """

    def __init__(self, data: NEODataModule, alone: bool) -> None:
        self.data, self.alone = data, alone
        self.values: dict[str, float] = {}

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Measures, unless the run resumes."""
        assert isinstance(module, NEOTraining)
        if trainer.global_step:
            return
        self.values["val/text_perplexity"] = self._perplexity(trainer, module.model)
        if self.alone:
            with torch.random.fork_rng():  # its constructors draw random numbers
                alone = language_model_alone(module.model.post_llm)
            self.values["val/text_perplexity_of_llm"] = self._perplexity(trainer, alone)
        log_once(trainer, self.values, 0)

    def _perplexity(self, trainer: lightning.Trainer, model: NEO) -> float:
        """Over all processes, of as many batches as a validation has."""
        limit = trainer.limit_val_batches if isinstance(trainer.limit_val_batches, int) else None
        training = model.training
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=trainer.strategy.root_device)
        with torch.no_grad(), torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            for batch in islice(self.data.validation_dataloader("text_validation"), limit):
                mean, count = mean_nll(model, trainer.strategy.batch_to_device(batch))
                total += torch.stack([mean.double() * count, count.double()])
        model.train(training)
        total = trainer.strategy.reduce(total, reduce_op="sum")
        return float((total[0] / total[1]).exp())

    def state_dict(self) -> dict[str, Any]:
        """The measured values, for a checkpoint."""
        return dict(self.values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the values of the resumed run."""
        self.values = dict(state_dict)
