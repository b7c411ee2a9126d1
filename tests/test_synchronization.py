"""A training step asks its device for nothing: counted on the CPU, on the code that a GPU runs.

Attention is ``eager`` here, as FlexAttention has no backward on CPU; the making of its masks is counted apart. The same
step runs on a GPU in ``test_gpu_training.py`` under ``torch.cuda.set_sync_debug_mode("error")``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from builders import random_batch, random_sample, set_backend, tiny_model
from host_reads import HostReads
from lightning.pytorch.callbacks import Callback
from llm_references import CASES, reference
from torch.utils.data import DataLoader

from neo_components import NEO, Batch, PatchEmbedding, PostLLM, PreBuffer, pack
from neo_components.components.experts import Added, route
from neo_components.components.layers import GatedFeedForward
from neo_components.components.masks import block_mask
from neo_components.components.primitive import NativePrimitive
from neo_components.recipe.stage import LoRA, StageConfig
from neo_components.registry import EXPERTS, MASKS, PATCH_EMBEDDINGS, ROPES
from neo_components.training.callbacks.progress import History, LineProgress
from neo_components.training.callbacks.visual_geometry import VisualGeometry
from neo_components.training.module import NEOTraining
from neo_components.types import IGNORED

FAMILIES = [pytest.param(family, case, id=f"{family}-{case}") for family, cases in CASES.items() for case in cases]


def reads_of_a_step(model: NEO, batch: Batch | None = None) -> list[tuple[str, str]]:
    """Operations of forward and backward that a CPU would wait for."""
    set_backend(model, "eager")
    batch = random_batch(model.input_spec, 1)[0] if batch is None else batch
    with torch.no_grad():
        model.hidden(batch)  # tables of frequencies are made on the CPU, once for each length of a document
    with HostReads() as reads:
        model.loss(batch).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.patch_embedding.parameters())
    return reads.found


@pytest.mark.parametrize("text", ["shared", "bypass"])
@pytest.mark.parametrize("rule", sorted(MASKS))
def test_every_mask_and_text_route(rule: str, text: str) -> None:
    plain = tiny_model(attention=rule)
    model = NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=text)
    assert reads_of_a_step(model) == []


@pytest.mark.parametrize("text", ["shared", "bypass"])
def test_batches_without_images_and_without_targets(text: str) -> None:
    plain = tiny_model()
    model = NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=text)
    set_backend(model, "eager")
    words = pack([random_sample(model.input_spec, 3, images=0)], model.input_spec)
    silent = pack([random_sample(model.input_spec, 3, images=1, learn=False)], model.input_spec)
    for batch in (words, silent):
        with HostReads() as reads:
            model.loss(batch).backward()
        assert reads.found == []


@pytest.mark.parametrize("rope", sorted(ROPES))
def test_every_rope(rope: str) -> None:
    assert reads_of_a_step(tiny_model(rope=rope)) == []


@pytest.mark.parametrize("name", sorted(PATCH_EMBEDDINGS))
def test_every_patch_embedding(name: str) -> None:
    plain = tiny_model()
    embedding = PATCH_EMBEDDINGS[name](plain.pre_buffer.hparams.hidden_size)
    assert reads_of_a_step(NEO(embedding, plain.pre_buffer, plain.post_llm)) == []


def two_feed_forwards(block: NativePrimitive) -> Added:
    """Visual tokens pass a feed-forward of their own."""
    h = block.hparams

    class Routed(GatedFeedForward):
        def forward(self, x: torch.Tensor, inputs: Any) -> torch.Tensor:
            return route(x, inputs.on_cpu.visual, self.visual, super().forward)

    block.mlp = Routed(h.hidden_size, h.feed_forward_size)
    block.mlp.visual = GatedFeedForward(h.hidden_size, h.feed_forward_size)
    return [(block.mlp.visual, block.mlp)]


@pytest.mark.parametrize("text", ["shared", "bypass"])
@pytest.mark.parametrize("experts", [*sorted(EXPERTS), "two_feed_forwards"])
def test_every_expert_routing(experts: str, text: str) -> None:
    if experts not in EXPERTS:
        EXPERTS.register(experts)(two_feed_forwards)
    try:
        plain = tiny_model(experts=experts)
        assert reads_of_a_step(NEO(plain.patch_embedding, plain.pre_buffer, plain.post_llm, text=text)) == []
    finally:
        EXPERTS._parts.pop("two_feed_forwards", None)


@pytest.mark.parametrize(("family", "case"), FAMILIES)
def test_every_family(family: str, case: str, tmp_path: Path) -> None:
    """Mixtures of experts in bfloat16 and a width of 16, whose experts one kernel computes."""
    sizes = CASES[family][case]
    if "moe_intermediate_size" in sizes:
        sizes = sizes | {"moe_intermediate_size": 16}
    reference(family, tmp_path, **sizes)
    llm = PostLLM.from_pretrained(tmp_path)
    h = llm.hparams
    pre_buffer = PreBuffer(1, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.feed_forward_size)
    model = NEO(PatchEmbedding(h.hidden_size, width=16, patch_size=4), pre_buffer, llm)
    if h.num_experts is not None:
        model = model.to(torch.bfloat16)
    assert reads_of_a_step(model) == []


@pytest.mark.parametrize("rule", sorted(MASKS))
def test_making_a_block_mask(rule: str) -> None:
    batch = random_batch(tiny_model().input_spec, 2)[0]
    with HostReads() as reads:
        block_mask(batch.document_ids, batch.image_ids, rule, window=5, token_kinds=batch.token_kinds)
    assert reads.found == []


def test_a_batch_of_a_device_takes_along_what_the_cpu_knows() -> None:
    """A batch on the meta device, whose values nobody can read, still has the indices of its targets."""
    batch = random_batch(tiny_model().input_spec, 1)[0]
    there = batch.to("meta")
    expected = (batch.labels[:, 1:] != IGNORED).sum()
    assert there.indices.targets.count == there.with_loss_weights(there.loss_weights).indices.targets.count == expected
    assert there.indices.targets.padded.is_meta and there.indices.visual.exact.shape == (len(batch.patches) // 4,)
    flat = batch.labels.flatten()[batch.indices.targets.exact]
    assert torch.equal(flat, batch.labels[:, 1:][batch.labels[:, 1:] != IGNORED])


class Watch(Callback):
    """Counts from the start of a step to that of the next, optimizer, callbacks and Lightning's own loop included."""

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, str]]] = []
        self.reads: HostReads | None = None

    def on_train_batch_start(self, *rest: Any) -> None:
        self.on_train_epoch_end()
        self.reads = HostReads()
        self.reads.__enter__()

    def on_train_epoch_end(self, *rest: Any) -> None:
        if self.reads is not None:
            self.reads.__exit__(None, None, None)
            self.steps.append(self.reads.found)
            self.reads = None


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ({}, {}),
        ({"optimizer": "muon"}, {}),
        ({"train": ("patch_embedding", "pre_buffer", "post_llm.hw")}, {"gradient_clip_val": 1.0}),
        ({"activation_checkpointing": 0.5}, {"accumulate_grad_batches": 2}),
        ({}, {"precision": "bf16-mixed"}),
        ({"lora": LoRA(rank=2), "train": ("pre_buffer",)}, {}),
    ],
    ids=["all", "muon", "stage 1, clipped", "accumulated", "bfloat16", "lora"],
)
def test_steps_of_the_trainer(stage: dict[str, Any], options: dict[str, Any]) -> None:
    """Only steps that are logged read losses and norms."""
    model = tiny_model()
    set_backend(model, "eager")
    batches = [random_batch(model.input_spec, seed)[0] for seed in range(8)]
    watch, history = Watch(), History()
    every = 4 // options.get("accumulate_grad_batches", 1)
    trainer = lightning.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", log_every_n_steps=every,
        callbacks=[history, LineProgress("steps"), VisualGeometry(), watch], **options,
    )  # fmt: skip
    config = StageConfig(**{"train": ("all",), "steps": 8, "lr": 1e-2} | stage)
    trainer.fit(NEOTraining(model, config), DataLoader(batches, batch_size=None))
    assert len(watch.steps) == 8 and len(history.losses) >= 4
    assert [found for number, found in enumerate(watch.steps) if number % 4 != 3] == [[]] * 6
    assert watch.steps[3] and watch.steps[7]
    assert trainer.progress_bar_metrics["train/loss"] == pytest.approx(history.losses[-1][2])


def test_reads_are_found() -> None:
    """The count itself: a mask as an index, a number read, the indices of what is not zero."""
    x = torch.arange(4.0)
    with HostReads() as reads:
        x[x > 1] = 0.0
        _ = x[x > 1], float(x.sum()), x.nonzero(), x[torch.tensor([0])], x.tolist()
    assert [name for name, _ in reads.found] == ["index_put_", "index", "_local_scalar_dense", "nonzero", "tolist"]
