"""Ways to compute attention agree: backends, the cache of generation, documents packed or alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from builders import (
    VOCAB,
    MRope,
    image_tokens,
    random_batch,
    random_image,
    random_sample,
    set_backend,
    tiny_model,
)
from torch import Tensor

from neo_components import NEO, Sample, pack
from neo_components.components.backends import EagerAttention, FlexAttention, SpanAttention, prepare_attention
from neo_components.registry import ROPES
from neo_components.types import PADDING

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without")

# Heads N, K and width E; patch side and fold: every value of each beside others.
SHAPES = [
    pytest.param((4, 2, 16), (8, 1), id="gqa2-e16-p8-f1"),
    pytest.param((4, 4, 8), (14, 2), id="mha-e8-p14-f2"),
    pytest.param((6, 2, 32), (16, 3), id="gqa3-e32-p16-f3"),
    pytest.param((2, 1, 64), (8, 3), id="mqa-e64-p8-f3"),
    pytest.param((3, 3, 4), (14, 1), id="mha-e4-p14-f1"),
]


def shaped(heads: tuple[int, int, int], patches: tuple[int, int]) -> NEO:
    model = tiny_model(
        patch={"patch_size": patches[0], "fold": patches[1]},
        num_heads=heads[0], num_kv_heads=heads[1], head_width=heads[2],
    )  # fmt: skip
    return model.eval()


WINDOWED: dict[str, Any] = {"depth": 3, "window": 5, "window_layers": [0, 2], "window_base_t": 100.0}
"""A post-LLM with windows that are shorter than the documents, and a rope of their own, in two of three blocks."""
LONG: dict[str, Any] = {
    "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [1.0, 3.0, 6.0, 9.0],
        "factor": 4.0, "original_max_position_embeddings": 12,
    },
}  # fmt: skip
"""Arguments under which documents that grow beyond 12 T positions turn otherwise."""
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 12}}


@pytest.mark.parametrize(("heads", "patches"), SHAPES)
def test_backends_agree(heads: tuple[int, int, int], patches: tuple[int, int]) -> None:
    """Hidden states of real tokens, losses, and gradients where the backend has them."""
    check_backends(shaped(heads, patches), heads[0])


@pytest.mark.parametrize("kind", ["mixed", "causal"])
def test_backends_agree_under_windows(kind: str) -> None:
    check_backends(tiny_model(post=WINDOWED, pre={"window": 7}, attention=kind).eval(), 1)


def check_backends(model: NEO, seed: int) -> None:
    batch, _ = random_batch(model.input_spec, seed=seed, rows=2, documents=4, text=(5, 30))
    assert batch.token_ids.shape[1] > 128
    real = batch.document_ids != PADDING
    states, losses, gradients = {}, {}, {}
    for backend in ("sdpa", "eager", "flex"):
        set_backend(model, backend)
        with torch.no_grad():
            states[backend] = model.hidden(batch)[real]
            losses[backend] = float(model.loss(batch))
        if backend != "flex":
            model.zero_grad()
            model.loss(batch).backward()
            gradients[backend] = {name: p.grad for name, p in model.named_parameters()}
    for backend in ("eager", "flex"):
        assert torch.allclose(states[backend], states["sdpa"], atol=2e-5), backend
        assert losses[backend] == pytest.approx(losses["sdpa"], abs=1e-5)
    for name, gradient in gradients["sdpa"].items():
        assert torch.allclose(gradient, gradients["eager"][name], atol=1e-5, rtol=1e-4), name


def test_long_documents_agree() -> None:
    """From 256 tokens on, where SDPA gets padded values, and over several length classes."""
    model = tiny_model()
    samples = [random_sample(model.input_spec, n, images=2, text=(20 * 3**n, 30 * 3**n)) for n in range(4)]
    batch = pack(samples, model.input_spec)
    assert max(len(sample.token_ids) for sample in samples) >= 512
    with torch.no_grad():
        set_backend(model, "sdpa")
        ours = model.hidden(batch)
        set_backend(model, "eager")
        assert torch.allclose(ours, model.hidden(batch), atol=2e-5)


def test_padding_is_finite_and_unread() -> None:
    """What padding holds changes no real token, and its own output is finite, so gradients through it are too."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=2)
    padding = batch.document_ids == PADDING
    for backend in ("sdpa", "eager", "flex"):
        set_backend(model, backend)
        with torch.no_grad():
            before = model.hidden(batch)
            batch.token_ids[padding] = 7
            after = model.hidden(batch)
            batch.token_ids[padding] = 0
        assert after.isfinite().all()
        assert torch.equal(before[~padding], after[~padding])


def test_choice_of_backend() -> None:
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert isinstance(prepare_attention(ids, ids - 1), SpanAttention)
    assert isinstance(prepare_attention(ids, ids - 1, backend="eager"), EagerAttention)
    assert isinstance(prepare_attention(ids, ids - 1, backend="flex"), FlexAttention)
    with pytest.raises(ValueError, match="backend must be one of auto, sdpa, flex, varlen, eager, got 'flash'"):
        prepare_attention(ids, ids - 1, backend="flash")


def test_flex_refuses_to_train_on_cpu() -> None:
    """Its backward on CPU would be wrong, so it is refused instead of computed."""
    model = tiny_model()
    set_backend(model, "flex")
    batch, _ = random_batch(model.input_spec, seed=0)
    with pytest.raises(ValueError, match="FlexAttention has no backward on CPU; use attention backend 'sdpa'"):
        model.loss(batch)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.loss(batch).isfinite()


def test_attention_maps_are_the_weights() -> None:
    """One [B, N, L, L] per block; each row sums to 1 and gives nothing to what the mask hides."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=4)
    maps = model.attention_maps(batch)
    assert len(maps) == 4
    size = batch.token_ids.shape[1]
    other = batch.document_ids[:, :, None] != batch.document_ids[:, None]
    for weights in maps:
        assert weights.shape == (2, 4, size, size)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, size), atol=1e-5)
        assert not weights.transpose(0, 1)[:, other].any()


def changed(sample: Sample, seed: int) -> Sample:
    """Another text and other pixels of the same lengths and sizes."""
    generator = torch.Generator().manual_seed(seed)
    text = sample.token_ids < 57
    other = torch.where(text, (sample.token_ids + 1) % 57, sample.token_ids)
    images = [torch.randn(image.shape, generator=generator) for image in sample.images]
    return Sample(other, sample.labels, images)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
def test_documents_do_not_leak(backend: str) -> None:
    """Changing one document of a row leaves the outputs of all others bit-equal."""
    model = tiny_model()
    set_backend(model, backend)
    samples = [random_sample(model.input_spec, seed, images=seed % 3) for seed in range(1, 6)]
    with torch.no_grad():
        before = pack(samples, model.input_spec)
        hidden = model.hidden(before)[0]
        for number in range(len(samples)):
            mixed = [changed(s, 99) if n == number else s for n, s in enumerate(samples)]
            after = model.hidden(pack(mixed, model.input_spec))[0]
            others = before.document_ids[0] != number
            assert torch.equal(hidden[others], after[others])
            assert not torch.allclose(hidden[~others], after[~others], atol=1e-2)


@pytest.mark.parametrize("backend", ["sdpa", "eager", "flex"])
def test_packed_equals_alone(backend: str) -> None:
    """A document gives the same hidden states whatever row it stands in."""
    model = tiny_model()
    set_backend(model, backend)
    batch, rows = random_batch(model.input_spec, seed=6, rows=2, documents=4)
    with torch.no_grad():
        together = model.hidden(batch)
        for row, samples in enumerate(rows):
            for number, sample in enumerate(samples):
                alone = model.hidden(pack([sample], model.input_spec))[0]
                inside = batch.document_ids[row] == number
                assert torch.allclose(together[row, inside], alone, atol=2e-5)


# Generation


def recomputed(model: NEO, sample: Sample, count: int) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens and logits, the whole sequence anew for each token."""
    ids, logits = sample.token_ids, []
    with torch.no_grad():
        for _ in range(count):
            batch = pack([Sample(ids, images=sample.images)], model.input_spec)
            logits.append(model(batch).logits[0, -1])
            ids = torch.cat([ids, logits[-1].argmax()[None]])
    return ids[len(sample.token_ids) :].tolist(), logits


def speaker(post: dict[str, Any] | None = None, **options: Any) -> NEO:
    """A model that cannot say image tokens: their ids lie beyond its vocabulary."""
    return tiny_model(post={"image_token_id": VOCAB} | (post or {}), **options)


def prompts_of(model: NEO, count: int = 5) -> list[Sample]:
    return [random_sample(model.input_spec, seed, images=seed % 3, learn=False) for seed in range(count)]


@pytest.fixture(scope="module")
def m_rope() -> Iterator[str]:
    """A variant whose text goes on behind an image's larger side, so that its shape matters to what follows."""
    ROPES.register("m-rope-of-generation")(MRope)
    yield "m-rope-of-generation"
    ROPES.remove("m-rope-of-generation")


@pytest.mark.parametrize("kind", ["plain", "mha-fold3", "tied", "causal", "1d", "m", "window", "long", "dynamic"])
def test_cached_generation_equals_full_recomputation(kind: str, m_rope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of different lengths, with and without images, in one call: ids exact, logits within 1e-4."""
    arguments: dict[str, dict[str, Any]] = {
        "plain": {},
        "mha-fold3": {"patch": {"fold": 3}, "num_kv_heads": 4},
        "tied": {"post": {"tie_embeddings": True}},
        "causal": {"attention": "causal"},
        "1d": {"rope": "1d"},
        "m": {"rope": m_rope, "head_width": 16},
        "window": {"post": WINDOWED, "pre": {"window": 3}},
        "long": LONG,
        "dynamic": {"post": DYNAMIC},
    }
    model = speaker(**arguments[kind])
    prompts = prompts_of(model)
    prompts.append(Sample(torch.tensor([5, *image_tokens(model.input_spec, (3, 2))]), images=[
        random_image(model.input_spec, (3, 2), torch.Generator().manual_seed(1))]))  # fmt: skip
    assert len({len(prompt.token_ids) for prompt in prompts}) > 3
    expected = [recomputed(model, prompt, 6) for prompt in prompts]
    if kind in ("long", "dynamic"):
        batches = [pack([prompt], model.input_spec) for prompt in prompts]
        ends = [int(batch.positions[..., 0].max()) + 1 for batch in batches]
        assert any(end <= 12 < end + 5 for end in ends) and any(end > 12 for end in ends)
    head, steps = model.post_llm.logits, []
    monkeypatch.setattr(model.post_llm, "logits", lambda hidden: steps.append(head(hidden)) or steps[-1])
    new = model.generate(prompts, max_new_tokens=6)
    assert [tokens.tolist() for tokens in new] == [tokens for tokens, _ in expected]
    assert len(steps) == 6
    for n, (_, logits) in enumerate(expected):
        cached = torch.stack([step[n] for step in steps])
        assert torch.allclose(cached, torch.stack(logits), atol=1e-4)


@pytest.mark.parametrize("post", [{}, WINDOWED, DYNAMIC], ids=["plain", "window", "dynamic"])
def test_stop_tokens_at_different_steps(post: dict[str, Any]) -> None:
    """Each prompt ends with its first stop token, which is included; the others go on unchanged."""
    model = speaker(post)
    prompts = prompts_of(model, 8)
    free = [tokens.tolist() for tokens in model.generate(prompts, max_new_tokens=8)]
    # The third token of one prompt and the first of another.
    stop = [free[1][2], free[4][0]]
    expected = []
    for tokens in free:
        ends = [n for n, token in enumerate(tokens) if token in stop]
        expected.append(tokens[: ends[0] + 1] if ends else tokens)
    assert len({len(tokens) for tokens in expected}) >= 3
    new = model.generate(prompts, max_new_tokens=8, stop_token_ids=stop)
    assert [tokens.tolist() for tokens in new] == expected
    assert all(tokens.dtype == torch.int64 for tokens in new)


def test_generation_leaves_the_model_as_it_was() -> None:
    model = speaker().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = model.generate(prompts_of(model), max_new_tokens=3)
    second = model.generate(prompts_of(model), max_new_tokens=3)
    assert [a.tolist() for a in first] == [b.tolist() for b in second]
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def drawn(model: NEO, seed: int, **options: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    prompts = prompts_of(model)
    new = model.generate(prompts, max_new_tokens=8, do_sample=True, generator=generator, **options)
    return [tokens.tolist() for tokens in new]


def test_sampling_repeats_with_its_seed() -> None:
    model = speaker()
    assert drawn(model, 1) == drawn(model, 1)
    assert drawn(model, 1) != drawn(model, 2)


def test_narrow_sampling_is_greedy() -> None:
    """A low temperature or a small top_p leaves only the likeliest token."""
    model = speaker()
    greedy = [tokens.tolist() for tokens in model.generate(prompts_of(model), max_new_tokens=8)]
    assert drawn(model, 1, temperature=1e-4) == greedy
    assert drawn(model, 1, top_p=1e-6) == greedy
    assert drawn(model, 1) != greedy


def test_top_p_keeps_the_smallest_set_that_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of probabilities .5, .3, .15, .05, a top_p of .6 keeps two, in proportion 5 to 3."""
    model = speaker()
    logits = torch.full((1, 60), -1e9)
    logits[0, [9, 4, 30, 2]] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    monkeypatch.setattr(model.post_llm, "logits", lambda hidden: logits.expand(len(hidden), -1))
    prompt = [Sample(torch.tensor([1, 2]))] * 400
    generator = torch.Generator().manual_seed(0)
    [*new] = model.generate(prompt, max_new_tokens=1, do_sample=True, top_p=0.6, generator=generator)
    tokens = torch.cat(new)
    assert set(tokens.tolist()) == {9, 4}
    # 5/8 of 400 draws, within five standard errors.
    assert abs(int((tokens == 9).sum()) - 250) < 5 * (400 * 5 / 8 * 3 / 8) ** 0.5


@pytest.mark.parametrize("wrong", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    model = speaker()
    with pytest.raises(ValueError, match=r"max_new_tokens >= 1, temperature > 0 and 0 < top_p <= 1, got "):
        model.generate(prompts_of(model, 1), **wrong)
