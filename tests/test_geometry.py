"""The geometry of tokens, and what of it a run logs."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from builders import random_batch, random_sample, tiny_model
from host_reads import HostReads
from torch.utils.data import DataLoader

from neo_components import NEO, Batch, pack
from neo_components.components.geometry import geometry_of
from neo_components.recipe.stage import StageConfig
from neo_components.training.callbacks.visual_geometry import VisualGeometry
from neo_components.training.module import NEOTraining
from neo_components.types import TokenKind


def test_geometry_of_known_tokens() -> None:
    """Four corners around (3, 0, 0, 0, 0, 0), whose variances are 1 and 4: (1 + 4)^2 / (1 + 16)."""
    x = torch.zeros(4, 6)
    x[:, 0] = 3.0
    x[:, 1] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    x[:, 2] = torch.tensor([2.0, -2.0, 2.0, -2.0])
    for tokens in (x, x.repeat(5, 1)):  # fewer tokens than directions, and more
        found = geometry_of(tokens)
        assert found.norm.item() == pytest.approx(14**0.5)
        assert found.mean_share.item() == pytest.approx(9 / 14)
        assert found.effective_rank.item() == pytest.approx(25 / 17)


def test_geometry_of_equal_and_of_random_tokens() -> None:
    equal = geometry_of(torch.full((5, 3), 2.0))
    assert (equal.mean_share.item(), equal.effective_rank.item()) == (1.0, 0.0)
    assert geometry_of(torch.zeros(2, 3)).mean_share.item() == 0.0
    random = geometry_of(torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)))
    assert random.effective_rank.item() == pytest.approx(8, abs=0.05) and random.mean_share.item() < 0.001
    with HostReads() as reads:
        geometry_of(torch.randn(9, 4))
    assert reads.found == []


def run(model: NEO, batches: list[Batch], every: int, **options: Any) -> VisualGeometry:
    geometry = VisualGeometry()
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", log_every_n_steps=every, callbacks=[geometry], **options,
    )  # fmt: skip
    stage = StageConfig(train=("all",), steps=len(batches), lr=0.0)  # the weights stay
    trainer.fit(NEOTraining(model, stage), DataLoader(batches, batch_size=None))
    assert not model.post_llm._forward_pre_hooks
    return geometry


@pytest.mark.parametrize("text", ["shared", "bypass"])
def test_a_run_measures_what_enters_the_language_model(text: str) -> None:
    plain = tiny_model()
    model = NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=text)
    batch = random_batch(model.input_spec, 1)[0]
    states = model(batch, output_hidden_states=True).hidden_states
    assert states is not None
    x = states["layer_1" if text == "shared" else "embed"].detach()  # its pre-Buffer has two blocks
    assert len(model.pre_buffer.layers) == 2
    tokens = geometry_of(x[batch.token_kinds == TokenKind.VISUAL])
    words = x[(batch.token_kinds == TokenKind.TEXT) & (batch.document_ids >= 0)].norm(dim=1).mean()
    assert run(model, [batch], 1).values == pytest.approx({
        "visual/norm": tokens.norm.item(), "visual/mean_share": tokens.mean_share.item(),
        "visual/effective_rank": tokens.effective_rank.item(), "words/norm": words.item(),
    }, rel=1e-5)  # fmt: skip


def test_steps_without_images_log_nothing_and_steps_between_entries_measure_nothing() -> None:
    model = tiny_model()
    spec = model.input_spec
    words = pack([random_sample(spec, 3, images=0)], spec)
    images = random_batch(spec, 1)[0]
    assert run(model, [words, words], 1).values == {}
    assert run(model, [images, words], 2).values == {}
    assert run(model, [images, words], 1, accumulate_grad_batches=2).values != {}
