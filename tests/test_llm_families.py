"""Every family of language models computes what transformers computes, as text and behind images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import by_section, random_image, randomize
from llm_references import CASES, LENGTH, reference
from torch import Tensor

from neo_components import NEO, PatchEmbedding, PostLLM, PreBuffer, Sample, pack
from neo_components.components.backends import SpanAttention
from neo_components.llms.layout import to_stored
from neo_components.registry import LLM_FAMILIES
from neo_components.storage.weights import TensorFiles
from neo_components.types import NO_IMAGE

ALL = [pytest.param(family, case, id=f"{family}-{case}") for family, cases in CASES.items() for case in cases]
FIRST = [pytest.param(family, next(iter(cases)), id=family) for family, cases in CASES.items()]
Pair = tuple[Any, PostLLM]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """A model of transformers and the post-LLM that its folder gives; both are left as they are."""

    @cache
    def make(family: str, case: str, seed: int = 1) -> Pair:
        folder = tmp_path_factory.mktemp("llm")
        return reference(family, folder, seed, **CASES[family][case]), PostLLM.from_pretrained(folder)

    return make


def native(llm: PostLLM) -> NEO:
    """The language model behind a pre-Buffer without blocks; 4-pixel patches."""
    h = llm.hparams
    pre_buffer = PreBuffer(0, h.hidden_size, h.num_heads, h.num_kv_heads, h.head_width, h.feed_forward_size)
    return NEO(PatchEmbedding(h.hidden_size, width=16, patch_size=4), pre_buffer, llm).eval()


def pictured(model: NEO, before: Tensor, after: Tensor) -> Sample:
    """A sample with one image of 2 x 3 visual tokens between two texts."""
    spec = model.input_spec
    ids = [*before, spec.image_start_id, *[spec.image_token_id] * 6, spec.image_end_id, *after]
    return Sample(torch.tensor(ids), images=[random_image(spec, (2, 3), torch.Generator().manual_seed(0))])


@pytest.mark.parametrize(("family", "case"), ALL)
@torch.no_grad()
def test_text_logits(family: str, case: str, pair: Callable[..., Pair]) -> None:
    """Short, and beyond every window and original context; two documents side by side."""
    theirs, ours = pair(family, case)
    for length in (12, LENGTH):
        ids = torch.randint(0, 90, (2, length))
        expected = theirs(ids).logits
        assert torch.allclose(ours.text_logits(ids), expected, atol=1e-4, rtol=0)
        assert float(expected.std()) > 0.3
    assert (ours.lm_head is None) is theirs.config.tie_word_embeddings


@pytest.mark.parametrize(("family", "case"), FIRST)
@torch.no_grad()
def test_text_logits_of_other_weights(family: str, case: str, pair: Callable[..., Pair]) -> None:
    for seed in (2, 3):
        theirs, ours = pair(family, case, seed)
        ids = torch.randint(0, 90, (1, LENGTH))
        assert torch.allclose(ours.text_logits(ids), theirs(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "case"), FIRST)
@torch.no_grad()
def test_bfloat16(family: str, case: str, pair: Callable[..., Pair]) -> None:
    """In bfloat16 both differ from float32 by rounding; ours on average by no more than transformers', within a tenth
    (they round after other steps), and from theirs by no more than two such errors together."""
    theirs, ours = pair(family, case)
    ids = torch.randint(0, 90, (4, LENGTH))
    exact = theirs(ids).logits
    low = copy.deepcopy(theirs).bfloat16()(ids).logits
    mine = copy.deepcopy(ours).bfloat16().text_logits(ids)
    assert mine.dtype == torch.bfloat16
    rounding = (low - exact).abs().mean()
    assert (mine - exact).abs().mean() < 1.1 * rounding
    assert (mine - low).abs().mean() < 2.1 * rounding
    assert 1e-4 < float(rounding) < 0.2


SPOKEN = [
    *FIRST,
    *(
        pytest.param(family, case, id=f"{family}-{case}")
        for family, case in (
            ("qwen3", "window"), ("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope-partial"),
            ("gemma3_text", "linear"), ("smollm3", "yarn-window"), ("qwen3_moe", "mixed"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("family", "case"), SPOKEN)
@torch.no_grad()
def test_greedy_generation(family: str, case: str, pair: Callable[..., Pair]) -> None:
    """64 tokens behind prompts of two lengths, in one call of ours: the ids of transformers, one prompt at a time."""
    theirs, ours = pair(family, case)
    prompts = [torch.randint(0, 90, (length,)) for length in (5, 14)]
    # The cache of transformers keeps keys that turned by other frequencies; there it too has to compute all anew.
    cached = case not in ("dynamic", "longrope", "longrope-partial")
    expected = [
        theirs.generate(p[None], max_new_tokens=64, do_sample=False, use_cache=cached)[0, len(p) :] for p in prompts
    ]
    new = native(ours).generate([Sample(p) for p in prompts], max_new_tokens=64)
    assert [tokens.tolist() for tokens in new] == [tokens.tolist() for tokens in expected]
    assert len({*new[0].tolist(), *new[1].tolist()}) > 5


@pytest.mark.parametrize(("family", "case"), SPOKEN)
@torch.no_grad()
def test_images_start_without_effect_on_text(
    family: str, case: str, pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text before the image gives the language model's logits, and the H/W part of every score is 0 exactly."""
    theirs, ours = pair(family, case)
    model = native(ours)
    before, after = torch.randint(0, 90, (6,)), torch.randint(0, 90, (4,))
    seen: list[tuple[Tensor, Tensor]] = []
    attend = SpanAttention.__call__

    def spy(self: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.append((q, k))
        return attend(self, q, k, v, scale)

    monkeypatch.setattr(SpanAttention, "__call__", spy)
    batch = pack([pictured(model, before, after)], model.input_spec)
    out = model(batch, output_hidden_states=True)
    logits = out.logits[0]
    assert out.hidden_states is not None
    visual = out.hidden_states["embed"][batch.image_ids != NO_IMAGE]
    # No factor of the word embeddings is one of visual tokens.
    assert torch.equal(visual, model.patch_embedding(batch.patches, batch.patch_positions))
    assert torch.allclose(logits[:6], theirs(before[None]).logits[0], atol=1e-4, rtol=0)
    assert len(seen) == ours.hparams.depth
    for q, k in seen:
        group = q.shape[2] // k.shape[2]
        _, *new_q = by_section(q, ours.hparams.head_width)
        _, *new_k = by_section(k.repeat_interleave(group, dim=2), ours.hparams.head_width)
        for part, other in zip(new_q, new_k, strict=True):
            assert part.abs().max() > 0.1
            scores = torch.einsum("bqnc,bknc->bnqk", part, other)
            assert torch.equal(scores, torch.zeros_like(scores))


@pytest.mark.parametrize(("family", "case"), ALL)
def test_every_parameter_learns(family: str, case: str, pair: Callable[..., Pair]) -> None:
    """One training step over text and an image: a finite gradient everywhere, and not zero but for unused experts."""
    model = native(copy.deepcopy(pair(family, case)[1])).train()
    # At the start the H/W keys are zero, so that only these would learn of the H/W parts.
    randomize(torch.nn.ModuleList(model.post_llm.hw_modules()))
    sample = pictured(model, torch.randint(0, 90, (9,)), torch.randint(0, 90, (30,)))
    sample.labels = sample.token_ids.where(sample.token_ids < 90, -100)
    model.loss(pack([sample], model.input_spec)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("family", "case"), FIRST)
def test_the_way_back_to_the_files(family: str, case: str, pair: Callable[..., Pair]) -> None:
    """Names and tensors of the family's own files, bit for bit."""
    llm = pair(family, case)[1]
    new = {id(p) for part in llm.hw_modules() for p in part.parameters()}
    state = {name: p.detach() for name, p in llm.named_parameters() if id(p) not in new}
    files = TensorFiles(Path(llm.hparams.source))
    stored = to_stored(state, LLM_FAMILIES[family](), dict(llm.hparams))
    assert set(stored) == set(files.names())
    assert all(torch.equal(files.get(name), tensor) for name, tensor in stored.items())


@pytest.mark.parametrize("case", ["longrope", "dynamic"])
@torch.no_grad()
def test_a_documents_length_is_its_own(case: str, pair: Callable[..., Pair]) -> None:
    """A short and a long document of one row turn as each does alone."""
    model = native(pair("llama", case)[1])
    texts = [torch.randint(0, 90, (length,)) for length in (10, 75, 19, 66)]
    row = model(pack([Sample(text) for text in texts], model.input_spec)).logits[0]
    for text, logits in zip(texts, row.split([len(text) for text in texts]), strict=True):
        assert torch.allclose(logits, model.post_llm.text_logits(text[None])[0], atol=1e-5)
    long = model.post_llm.text_logits(texts[1][None])[0, :10]
    assert not torch.allclose(long, model.post_llm.text_logits(texts[1][None, :10])[0], atol=1e-2)
