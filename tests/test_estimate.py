"""What a step keeps is within 15 % of what autograd saves, and a budget for it is held with equal results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import SIZES, random_batch, set_backend, tiny_model
from test_bypass import around
from torch import Tensor

from neo_components import NEO, Batch, load_recipe, pack
from neo_components.components.moe import SparseFeedForward
from neo_components.estimate.activations import Activations, Block, kept_activations
from neo_components.estimate.assumed import Document, assumed_batch
from neo_components.estimate.memory import Plan, step_memory
from neo_components.estimate.tracing import SavedBytes, Setting, evenly_routed
from neo_components.recipe.stage import StageConfig
from neo_components.training.activation_checkpointing import blocks_of, fractions, resolve_auto, worst_batches
from neo_components.training.groups import train_only
from neo_components.training.module import NEOTraining
from neo_components.types import NO_IMAGE

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
ONE = ["patch_embedding", "pre_buffer", "post_llm.hw"]
CPU = Setting()


def saved(model: NEO, batch: Batch, bf16: bool = False) -> int:
    """Bytes that autograd saves in a step, weights and batch left out."""
    apart = [*model.parameters(), *(value for value in vars(batch).values() if isinstance(value, Tensor))]
    with SavedBytes(apart) as kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.loss(batch)
    return kept.bytes


def told(model: NEO, batch: Batch, bf16: bool = False) -> int:
    """The estimate without the gradients that the loss holds itself, which autograd does not see."""
    found = kept_activations(model, batch, Setting("cpu", torch.bfloat16 if bf16 else None))
    return found.total(model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks) - found.loss


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The module of ``benchmarks/activation_memory.py``."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import activation_memory

        yield activation_memory
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("shape", [(128, 2, 4, 512, 8, 64), (192, 1, 2, 512, 2, 300), (128, 2, 1, 512, 1, 512)])
def test_within_15_percent_of_what_autograd_saves(
    benchmark: Any, shape: tuple[int, ...], stage: int, share: float, bf16: bool
) -> None:
    """Shapes and counting of the benchmark: short documents (all scores kept), fused attention, one long document."""
    case = benchmark.Case(*shape, stage, share, bf16)
    model, batch = benchmark.build(case)
    assert benchmark.estimates(model, batch, case)[0] == pytest.approx(benchmark.kept(model, batch, case), rel=0.15)


KINDS: dict[str, dict[str, Any]] = {
    "experts": {"num_experts": 4, "experts_per_token": 2},
    "norms on both sides": {"norm_placement": "both", "qk_norm": "none", "activation": "gelu_tanh"},
    "windows": {"window": 3, "window_layers": [0], "rotary_width": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_blocks(kind: str) -> None:
    wide = {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_width": 16, "feed_forward_size": 160}
    model = tiny_model(pre=wide, post=wide | KINDS[kind])
    batch, _ = random_batch(model.input_spec, seed=3, rows=2, documents=12)
    for stage in (ONE, ["all"], ["post_llm.hw"]):
        train_only(model, stage)
        assert told(model, batch) == pytest.approx(saved(model, batch), rel=0.15), stage


def test_eager_attention_and_words_around_the_pre_buffer() -> None:
    for model in (tiny_model(), around(width=24)):
        set_backend(model, "eager")
        batch, _ = random_batch(model.input_spec, seed=3, rows=1, documents=12)
        # The viewers' copies of the weights hang on the backend, not on autograd.
        assert told(model, batch) == pytest.approx(saved(model, batch), rel=0.15)


def test_nothing_trains_nothing_is_kept() -> None:
    model = tiny_model()
    model.requires_grad_(False)
    batch, _ = random_batch(model.input_spec, seed=3)
    found = kept_activations(model, batch, CPU)
    assert sum(block.full for block in (*found.pre_buffer, *found.post_llm)) == 0
    train_only(model, ["post_llm.hw"])  # the blocks below stay free
    found = kept_activations(model, batch, CPU)
    assert [block.full for block in found.pre_buffer] == [0, 0]
    assert all(block.full > block.input for block in found.post_llm)


def test_tracing_leaves_the_model_alone() -> None:
    """Weights may lie on the meta device or hold numbers; experts are routed as before."""
    model = tiny_model(post=KINDS["experts"])
    batch, _ = random_batch(model.input_spec, seed=3)
    with torch.no_grad():
        before = model.loss(batch)
    found = kept_activations(model, batch, CPU)
    with torch.no_grad():
        assert torch.equal(model.loss(batch), before)
    assert kept_activations(model.to("meta"), batch, CPU) == found
    layer = next(part for part in model.modules() if isinstance(part, SparseFeedForward))
    chosen = torch.tensor([[0, 1], [0, 2], [0, 3]])
    with evenly_routed(model):
        assert layer.tokens_of(chosen) == [1, 1, 2, 2]
    assert layer.tokens_of(chosen) == [3, 1, 1, 1]
    assert not torch.is_autocast_enabled("cpu")


def test_a_gpu_is_traced_without_one() -> None:
    """FlexAttention keeps its inputs and output, so documents do not matter; bfloat16 keeps less than float32."""
    model = tiny_model()
    few, many = (assumed_batch(model, Document(4, text), 1, 240) for text in (234, 6))
    cuda = [kept_activations(model, batch, Setting("cuda")) for batch in (few, many)]
    assert cuda[0].post_llm == cuda[1].post_llm
    half = kept_activations(model, few, Setting("cuda", torch.bfloat16))
    assert half.post_llm[0].full < cuda[0].post_llm[0].full
    # What a block must at least keep of a row: its input, queries and keys twice E wide, values, output.
    heads, kv, width, hidden = (SIZES[n] for n in ("num_heads", "num_kv_heads", "head_width", "hidden_size"))
    least = 240 * 4 * (hidden + heads * 2 * width + kv * 2 * width + kv * width + heads * width)
    assert cuda[0].post_llm[0].full > least


# --- memory by kind


def test_kinds_by_hand() -> None:
    model = tiny_model()
    train_only(model, ONE)
    batch = assumed_batch(model, Document(6, 10), 1, 60)
    count = sum(p.numel() for p in model.parameters())
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = kept_activations(model, batch, CPU)
    single = step_memory(model, batch, CPU, Plan(), kept)
    assert single.kinds["weights"] == 4 * count
    assert (single.kinds["gradients"], single.kinds["optimizer states"]) == (4 * learns, 8 * learns)
    assert single.kinds["activations"] == kept.total()
    assert single.kinds["weights"] + single.kinds["optimizer states"] + kept.total() < single.peak
    assert single.peak <= sum(single.kinds.values())
    held = step_memory(model, batch, CPU, Plan(), kept, accumulates=True)
    assert held.peak >= single.peak
    ddp = step_memory(model, batch, CPU, Plan("ddp", 4), kept)
    assert ddp.kinds == single.kinds | {"gradient buckets": 4 * learns}
    divided = step_memory(model, batch, CPU, Plan("fsdp2", 4), kept, average=True)
    assert divided.kinds["weights"] == count == divided.kinds["average of weights"]
    assert (divided.kinds["gradients"], divided.kinds["optimizer states"]) == (learns, 2 * learns)
    half = step_memory(model, batch, replace(CPU, weights=torch.bfloat16), Plan(), kept)
    assert half.kinds["weights"] == 2 * count
    muon = step_memory(model, batch, CPU, Plan(), kept, single_moment=list(model.parameters()))
    assert muon.kinds["optimizer states"] == 4 * learns


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (("zero", 2), "strategy must be one of single, ddp, fsdp2, got 'zero'"),
        (("single", 2), "strategy single has one device, got 2"),
        (("fsdp2", 0), "devices must be 1 or more, got 0"),
    ],
)
def test_impossible_plans(plan: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(*plan)


def test_assumed_rows_look_like_packed_ones() -> None:
    """The same ids, images and labels as ``pack`` gives for such documents."""
    model = tiny_model()
    spec = model.input_spec
    batch = assumed_batch(model, Document(6, 4, 0.5), 2, 32)
    assert batch.token_ids[0, :12].tolist() == [58, *[57] * 6, 59, 0, 0, 0, 0]
    assert batch.document_ids[0].tolist() == [0] * 12 + [1] * 12 + [2] * 8
    assert batch.image_ids[0].unique().tolist() == [NO_IMAGE, 0, 1]
    assert batch.labels[1].ne(-100).nonzero().flatten().tolist() == [10, 11, 22, 23]
    assert len(batch.patches) == 2 * 2 * 6 * 4 and batch.patches.is_meta
    from neo_components import Sample

    ids = torch.tensor([58, *[57] * 6, 59, 0, 0, 0, 0])
    samples = [Sample(ids, ids.where(torch.arange(12) >= 10, -100), [torch.zeros(3, 16, 24)])] * 2
    packed = pack(samples, spec, seq_len=32)
    assert torch.equal(packed.image_ids[0], batch.image_ids[0])
    assert torch.equal(packed.labels[0], batch.labels[0])
    assert len(packed.patches) * 2 == len(batch.patches)
    with pytest.raises(
        ValueError, match="a document of 40 visual and 4 other tokens does not fit a packed sequence of 32"
    ):
        assumed_batch(model, Document(40, 4), 1, 32)


# --- the fraction of checkpointed blocks


def test_shares_step_block_by_block() -> None:
    found = fractions(2, 4)
    assert found[0] == 0.0
    assert [(blocks_of(s, 2), blocks_of(s, 4)) for s in found] == [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, 3),
        (2, 4),
    ]


DATA = {"micro_batch_size": 1, "seq_len": 96, "max_length": None}


def stage(**changes: Any) -> StageConfig:
    return StageConfig(train=("all",), **{"activation_checkpointing": "auto", "warmup_steps": 0} | changes)


def needed(model: NEO, share: float) -> int:
    """Bytes that the worst rows keep with that share, and one block more while it is recomputed."""
    counts = [blocks_of(share, len(stack.layers)) for stack in (model.pre_buffer, model.post_llm)]
    kept = [kept_activations(model, batch, CPU) for batch in worst_batches(model, DATA, "cpu")]
    return max(one.total(*counts) + one.largest(*counts) for one in kept)


def test_a_budget_is_held_and_the_result_is_the_same() -> None:
    """For each budget the least share, whose saved bytes stay below it; gradients are equal bit for bit."""
    batch, _ = random_batch(tiny_model().input_spec, seed=4, rows=1, documents=4, padding=0)
    assert batch.token_ids.shape[1] <= DATA["seq_len"]
    plain = tiny_model(pre={"depth": 3}, post={"depth": 5})
    plain.loss(batch).backward()
    steps = fractions(3, 5)
    chosen = set()
    for share in steps[::2]:
        model = tiny_model(pre={"depth": 3}, post={"depth": 5})
        budget = needed(model, share)
        found = resolve_auto(stage(activation_gb=budget / 1e9), model, DATA, CPU, None, Plan())
        assert found.activation_checkpointing <= share
        earlier = [s for s in steps if s < found.activation_checkpointing]
        assert all(needed(model, s) > budget for s in earlier)
        assert (model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks) == (0, 0)
        module = NEOTraining(model, found)
        assert saved(model, batch) <= budget
        module.model.loss(batch).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad), name  # type: ignore[arg-type]
        chosen.add(found.activation_checkpointing)
    assert len(chosen) > 2


def test_what_never_fits_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=r"with every block checkpointed .* GB are needed, and stage.activation_gb is"):
        resolve_auto(stage(activation_gb=1e-6), model, DATA, CPU, None, Plan())
    with pytest.raises(ValueError, match="the device's memory is not known; set"):
        resolve_auto(stage(), model, DATA, Setting("cuda"), None, Plan())
    with pytest.raises(ValueError, match="90% of the device's memory is"):
        resolve_auto(stage(), model, DATA, CPU, 1000, Plan())
    assert resolve_auto(stage(), model, DATA, CPU, 10**12, Plan()).activation_checkpointing == 0.0
    fixed = stage(activation_checkpointing=0.5)
    assert resolve_auto(fixed, model, DATA, CPU, None, Plan()) is fixed


def test_less_memory_recomputes_more() -> None:
    """Without a budget of its own, by what the whole step takes."""
    model = tiny_model(pre={"depth": 3}, post={"depth": 5})
    rows = worst_batches(model, DATA, "cpu")
    peaks = []
    for counts in ((0, 0), (3, 5)):
        model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks = counts
        peaks.append(max(step_memory(model, b, CPU, Plan(), kept_activations(model, b, CPU)).peak for b in rows))
    found = [
        resolve_auto(stage(), model, DATA, CPU, int(memory / 0.9) + 1, Plan()).activation_checkpointing
        for memory in (peaks[0], sum(peaks) / 2, peaks[1])
    ]
    assert found[0] == 0.0 < found[1] < found[2]  # type: ignore[operator]


def test_wrong_keys_are_told(world: Path) -> None:
    with pytest.raises(ValueError, match="activation_gb: has no effect without"):
        stage(activation_checkpointing=0.0, activation_gb=2.0)
    for value in ("all", "1.5", "-0.1"):
        with pytest.raises(ValueError, match=r"stage\.activation_checkpointing"):
            load_recipe(world / "run.yaml", [f"stage.activation_checkpointing={value}"])
    with pytest.raises(ValueError, match="activation_checkpointing is auto: resolve it first"):
        NEOTraining(tiny_model(), stage())
    assert (
        load_recipe(
            world / "run.yaml", ["stage.activation_checkpointing=auto", "stage.activation_gb=1"]
        ).stage.activation_checkpointing
        == "auto"
    )


def test_totals() -> None:
    kept = Activations(1, 2, [Block(10, 3)], [Block(20, 4), Block(30, 5)], 6, 3, 4)
    assert kept.total() == 76
    assert kept.total(1, 1) == 76 - 7 - 16
    assert (kept.largest(0, 0), kept.largest(1, 0), kept.largest(1, 2)) == (0, 10, 30)
