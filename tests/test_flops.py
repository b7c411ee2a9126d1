"""FLOPs of a step: equal to those that torch counts while it runs, and pairs equal to the mask's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import SIZES, random_batch, randomize, set_backend, tiny_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from neo_components import NEO, Batch, PatchEmbedding, PostLLM, PreBuffer
from neo_components.components.bridge import Bridge
from neo_components.components.masks import LayerRule, Tokens, dense_mask
from neo_components.estimate.flops import Flops, attended_pairs, step_flops
from neo_components.registry import MASKS
from neo_components.training.groups import train_only
from neo_components.types import PADDING


@pytest.mark.parametrize("rule", ["causal", "mixed", "every-third"])
@pytest.mark.parametrize("window", [None, 1, 3, 200])
def test_pairs_are_those_of_the_mask(rule: str, window: int | None) -> None:
    batch, _ = random_batch(tiny_model().input_spec, seed=2, rows=3, documents=4)

    def every_third(query: Tokens, key: Tokens) -> Tensor:
        return MASKS["causal"](query, key) & ((query.position - key.position) % 3 == 0)

    MASKS.register("every-third")(every_third)
    try:
        whole = dense_mask(batch.document_ids, batch.image_ids, rule, window)
        whole = whole & (batch.document_ids != PADDING)[:, :, None]
        found = attended_pairs(batch.document_ids, batch.image_ids, LayerRule(rule, window))
        assert found == int(whole.sum()) > 0
    finally:
        MASKS.remove("every-third")


def added(x: list[int], a: list[int], b: list[int], **_: Any) -> int:
    """FLOPs of ``x.addmm_(a, b)``."""
    return 2 * a[0] * a[1] * b[1]


def counted(model: NEO, batch: Batch) -> int:
    """FLOPs that torch counts in forward and backward; it does not know the product that adds in place by itself."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        model.loss(batch).backward()
    return int(counter.get_total_flops())


def whole_rows(model: NEO, seed: int = 5) -> Batch:
    """A row that is one document with an image, without padding."""
    batch, _ = random_batch(model.input_spec, seed=seed, rows=1, documents=1, padding=0, images=1)
    return batch


STAGES: dict[str, list[Any]] = {
    "one": ["patch_embedding", "pre_buffer", "post_llm.hw"],
    "all": ["all"],
    "hw": ["post_llm.hw"],
    "head": ["post_llm.head"],
    "words": ["post_llm.word_embedding"],
    "pel": ["patch_embedding"],
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("family", ["neo", "experts", "after", "windows"])
def test_torch_counts_the_same(name: str, family: str) -> None:
    """Eager attention computes all pairs of a row, so the pairs that the mask hides are added before comparing."""
    kinds: dict[str, dict[str, Any]] = {
        "neo": {},
        "experts": {"num_experts": 4, "experts_per_token": 2, "expert_layers": [1], "expert_size": 16},
        "after": {"norm_placement": "after", "qk_norm": "whole"},
        "windows": {"window": 4, "window_layers": [0]},
    }
    model = tiny_model(post=kinds[family])
    set_backend(model, "eager")
    train_only(model, STAGES[name])
    batch = whole_rows(model)
    found = step_flops(model, batch)
    square = batch.token_ids.shape[1] ** 2
    ours = sum(part.model + part.again for part in found.values())
    ours += sum(_hidden(model, block, square, batch) for block in range(4))
    if name == "hw" and family != "after":
        # The first block's projections are one function, so values get a gradient that nothing needs.
        ours += 2 * square * SIZES["num_heads"] * SIZES["head_width"]
    assert ours == counted(model, batch)


def _hidden(model: NEO, number: int, square: int, batch: Batch) -> int:
    """What eager attention of a block computes for pairs that the mask hides."""
    blocks = [*model.pre_buffer.layers, *model.post_llm.layers]
    rule = model.layer_rules[number]
    seen = attended_pairs(batch.document_ids, batch.image_ids, rule)
    before = step_flops(model, batch)
    with_rule = {n: b.layer_rule for n, b in enumerate(blocks)}
    try:
        # The same block, told that everything is seen: a rule of its own that shows all pairs.
        MASKS.register("everything")(lambda query, key: query.document == key.document)
        blocks[number].layer_rule = LayerRule("everything")
        after = step_flops(model, batch)
    finally:
        blocks[number].layer_rule = with_rule[number]
        MASKS.remove("everything")
    assert seen <= square
    return sum(part.model for part in after.values()) - sum(part.model for part in before.values())


def test_bridges_and_words_around_the_pre_buffer() -> None:
    """A pre-Buffer of another width; shared text passes two bridges, text around it one and fewer tokens."""
    for text in ("shared", "bypass"):
        pre = PreBuffer(depth=2, **SIZES | {"hidden_size": 24}, backend="eager")
        post = PostLLM(60, depth=2, image_token_id=57, **SIZES, backend="eager")
        bridges = [Bridge(32, 24) if text == "shared" else None, Bridge(24, 32)]
        model = NEO(PatchEmbedding(24, width=16, patch_size=4), pre, post, *bridges, text=text)
        randomize(model)
        train_only(model, ["all"])
        batch = whole_rows(model, 6)
        found = step_flops(model, batch)
        hidden = sum(_hidden(model, block, batch.token_ids.shape[1] ** 2, batch) for block in range(4))
        assert sum(part.model + part.again for part in found.values()) + hidden == counted(model, batch), text
        assert found["bridge"].forward > 0


def test_by_hand() -> None:
    """Two tokens of text through one block: written out."""
    model = tiny_model(pre={"depth": 0}, post={"depth": 1})
    train_only(model, ["all"])
    batch, _ = random_batch(model.input_spec, seed=1, rows=1, documents=1, padding=5, images=0, text=(1, 1))
    tokens = int((batch.document_ids != PADDING).sum())
    learnt = int((batch.labels[:, 1:] != -100).sum())
    # D 32, N 4, K 2, E 8, F 48, V 60: q, q_hw, o 32 x 32 each; k, k_hw, v 32 x 16 each; feed-forward 3 x 32 x 48.
    projections = 2 * tokens * (3 * 32 * 32 + 3 * 32 * 16 + 3 * 32 * 48)
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * pairs * 4 * (16 + 8)
    found = step_flops(model, batch)
    assert found["post_llm"] == Flops(projections + attention, 2 * (projections + attention), 0)
    assert found["head"] == Flops(2 * learnt * 32 * 60, 4 * learnt * 32 * 60)
    assert found["patch_embedding"] == found["pre_buffer"] == Flops()


def test_what_recomputation_adds() -> None:
    model = tiny_model()
    train_only(model, ["all"])
    batch = whole_rows(model)
    plain = step_flops(model, batch)
    model.pre_buffer.checkpointed_blocks, model.post_llm.checkpointed_blocks = 1, 2
    again = step_flops(model, batch)
    assert {name: part.model for name, part in plain.items()} == {name: part.model for name, part in again.items()}
    assert again["post_llm"].again == again["post_llm"].forward
    assert 0 < again["pre_buffer"].again == again["pre_buffer"].forward // 2
    model.requires_grad_(False)  # nothing to compute gradients for, nothing to compute again
    assert all(part.backward == part.again == 0 for part in step_flops(model, batch).values())


def test_weights_may_lie_nowhere() -> None:
    model = tiny_model()
    train_only(model, STAGES["one"])
    batch = whole_rows(model)
    found = step_flops(model, batch)
    assert step_flops(model.to("meta"), batch) == found
    assert sum(part.backward for part in found.values()) > 0
