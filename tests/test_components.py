"""The components one by one: what they compute, that they learn, that they stand alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from builders import SIZES, VOCAB, by_section, random_batch, random_image, random_sample, randomize, tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import neo_components.model
from neo_components import (
    NEO,
    Batch,
    Bridge,
    InputSpec,
    NativePrimitive,
    PatchEmbedding,
    PostLLM,
    PreBuffer,
    Sample,
    pack,
)
from neo_components.components.backends import prepare_attention
from neo_components.components.rotary import native_positions
from neo_components.packing import patchify
from neo_components.types import IGNORED

# Patch embedding


def by_convolution(layer: PatchEmbedding, image: Tensor) -> Tensor:
    """[visual tokens, D] of one image [C, H, W] by the paper's two convolutions and position encoding."""
    h = layer.hparams
    first = layer.patch_proj.weight.view(h.width, h.channels, h.patch_size, h.patch_size)
    second = layer.token_proj.weight.view(h.hidden_size, h.fold, h.fold, h.width).permute(0, 3, 1, 2)
    x = F.gelu(F.conv2d(image[None], first, layer.patch_proj.bias, stride=h.patch_size))[0]
    columns, rows = torch.arange(x.shape[2]).double(), torch.arange(x.shape[1]).double()
    quarter = h.width // 4
    frequency = torch.tensor([h.base ** (-2 * k / (h.width // 2)) for k in range(quarter)], dtype=torch.float64)
    # Angles [width / 2, rows, columns]: the first half of the pairs by column, the second by row.
    by_column = (frequency[:, None] * columns)[:, None].expand(-1, len(rows), -1)
    by_row = (frequency[:, None] * rows)[:, :, None].expand(-1, -1, len(columns))
    angle = torch.cat([by_column, by_row])
    if h.position == "rotary":
        pairs = torch.complex(x[0::2].double(), x[1::2].double()) * torch.polar(torch.ones_like(angle), angle)
        x = torch.stack([pairs.real, pairs.imag], dim=1).flatten(0, 1).float()
    if h.position == "sincos":
        x = x + torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1).float()
    tokens = F.conv2d(x[None], second, layer.token_proj.bias, stride=h.fold)[0]
    return tokens.flatten(1).T


@pytest.mark.parametrize("position", ["rotary", "sincos", "none"])
@pytest.mark.parametrize(("patch_size", "fold", "channels"), [(16, 2, 3), (14, 1, 3), (8, 3, 1), (4, 4, 4)])
def test_patch_embedding_is_two_convolutions(position: str, patch_size: int, fold: int, channels: int) -> None:
    """All images of a batch at once, of different sizes, against one convolution stack per image."""
    layer = PatchEmbedding(12, width=16, patch_size=patch_size, fold=fold, channels=channels, position=position)
    randomize(layer)
    spec = InputSpec(0, 1, 2, 3, patch_size, fold, channels, native_positions)
    generator = torch.Generator().manual_seed(1)
    images = [random_image(spec, grid, generator) for grid in [(1, 1), (2, 5), (4, 3)]]
    with torch.no_grad():
        expected = torch.cat([by_convolution(layer, image) for image in images])
        tokens = layer(*patchify(images, spec))
    assert tokens.shape == (1 + 10 + 12, 12)
    assert torch.allclose(tokens, expected, atol=1e-4)


def test_patch_embedding_starts_at_unit_gain() -> None:
    """Weights are normal(0, 1/sqrt(fan in)), biases zero."""
    layer = PatchEmbedding(64, width=64, patch_size=8)
    for projection in (layer.patch_proj, layer.token_proj):
        std = projection.in_features**-0.5
        assert float(projection.weight.detach().std()) == pytest.approx(std, rel=0.05)
        assert not projection.bias.any()


def test_patch_embedding_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="position must be one of rotary, sincos, none, got 'learned'"):
        PatchEmbedding(8, position="learned")
    with pytest.raises(ValueError, match=r"width must be a multiple of 4.*got 10"):
        PatchEmbedding(8, width=10)


# Learning


@pytest.mark.parametrize(
    "make",
    [
        tiny_model,
        lambda: tiny_model(post={"tie_embeddings": True}),
        lambda: tiny_model(patch={"position": "sincos", "fold": 1}, num_kv_heads=4),
        lambda: tiny_model(pre={"depth": 0}),
        lambda: tiny_model(rope="1d", attention="causal"),
    ],
    ids=["native", "tied", "sincos-mha", "no-pre-buffer", "1d-causal"],
)
def test_every_parameter_learns(make: Callable[[], NEO]) -> None:
    """Each gets a finite gradient that is not all zero."""
    model = make()
    batch, _ = random_batch(model.input_spec, seed=1, images=1)
    model.loss(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def fresh_llm(**options: Any) -> PostLLM:
    """A random language model, widened as a pretrained one is."""
    llm = PostLLM(VOCAB, 2, **SIZES, **options)
    randomize(llm)
    llm.init_hw_from_t()
    return llm


def test_a_fresh_widening_learns_though_its_keys_are_zero() -> None:
    """The norm of zero keys has a steep but finite gradient; the queries learn once the keys have moved."""
    patch = PatchEmbedding(32, width=16, patch_size=4)
    model = NEO(patch, PreBuffer(1, **SIZES), fresh_llm())
    batch, _ = random_batch(model.input_spec, seed=1, images=1)
    model.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    attention = model.post_llm.layers[0].self_attn
    assert attention.k_proj_hw.weight.grad.any()
    assert not attention.q_proj_hw.weight.grad.any()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    model.zero_grad()
    model.loss(batch).backward()
    assert attention.q_proj_hw.weight.grad.any()


def test_hw_score_is_zero_at_the_start() -> None:
    """H and W add exactly 0 to every score of a widened language model, for text and visual tokens."""
    llm = fresh_llm()
    attention = llm.layers[0].self_attn
    seen: dict[str, Tensor] = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen.update(q=q, k=k)
        return v.new_zeros(*q.shape[:3], v.shape[-1])

    positions = torch.randint(0, 30, (1, 20, 3))
    attention(torch.randn(1, 20, 32), llm.rotary(positions), attend)
    (_, *q_hw), (k_t, *k_hw) = by_section(seen["q"], 8), by_section(seen["k"], 8)
    assert all(part.any() for part in (k_t, *q_hw))
    assert not any(part.any() for part in k_hw)


def test_queries_start_from_the_fastest_half_of_t() -> None:
    """Of each head's rows of the T query, quarters 1 and 3 are copied, once for H and once for W; norms are 1."""
    attention = fresh_llm().layers[1].self_attn
    t, hw = attention.q_proj.weight.view(4, 8, 32), attention.q_proj_hw.weight.view(4, 8, 32)
    rows = [0, 1, 4, 5]
    assert torch.equal(hw, t[:, rows + rows])
    for norm in (attention.q_norm_h, attention.q_norm_w, attention.k_norm_h, attention.k_norm_w):
        assert torch.equal(norm.weight, torch.ones(4))


def test_text_is_unchanged_by_an_empty_pre_buffer_and_an_image_behind_it() -> None:
    llm = fresh_llm()
    model = NEO(PatchEmbedding(32, width=16, patch_size=4), PreBuffer(0, **SIZES), llm)
    spec = model.input_spec
    text = torch.randint(0, VOCAB, (15,))
    image = torch.tensor([spec.image_start_id, *[spec.image_token_id] * 6, spec.image_end_id])
    sample = Sample(torch.cat([text, image]), images=[torch.randn(3, 16, 24)])
    with torch.no_grad():
        expected = llm.text_logits(text[None])[0]
        alone = model(pack([Sample(text)], spec)).logits[0]
        before_image = model(pack([sample], spec)).logits[0, :15]
    assert torch.equal(alone, expected)
    assert torch.allclose(before_image, expected, atol=1e-5)


def test_text_logits_refuses_ids_beyond_the_vocabulary() -> None:
    llm = fresh_llm()
    for wrong in (VOCAB, -1):
        with pytest.raises(ValueError, match=rf"token ids must lie in 0 to {VOCAB - 1}, got .*{wrong}"):
            llm.text_logits(torch.tensor([[3, wrong]]))


# Alone


def component(name: str) -> lightning.LightningModule:
    parts: dict[str, Callable[[], lightning.LightningModule]] = {
        "PatchEmbedding": lambda: PatchEmbedding(32, width=16, patch_size=4, position="sincos"),
        "NativePrimitive": lambda: NativePrimitive(**SIZES, base_h=1e3),
        "PreBuffer": lambda: PreBuffer(2, **SIZES, attention="causal", backend="eager"),
        "PostLLM": lambda: PostLLM(VOCAB, 2, **SIZES, tie_embeddings=True),
        "Bridge": lambda: Bridge(32, 24),
    }
    return parts[name]()


COMPONENTS = ("PatchEmbedding", "NativePrimitive", "PreBuffer", "PostLLM", "Bridge")


@pytest.mark.parametrize("name", COMPONENTS)
def test_hyperparameters_are_plain_and_rebuild_the_component(name: str) -> None:
    module = component(name)
    assert isinstance(module, lightning.LightningModule)
    told = json.loads(json.dumps(dict(module.hparams)))
    assert told == dict(module.hparams)
    again = type(module)(**told)
    assert dict(again.hparams) == dict(module.hparams)
    again.load_state_dict(module.state_dict())


class Alone(lightning.LightningModule):
    """A user's own training of one component."""

    def __init__(self, part: nn.Module, output: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.part, self.output = part, output

    def training_step(self, batch: Any, number: int) -> Tensor:
        return self.output(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.parametrize("name", COMPONENTS)
def test_usable_alone(name: str) -> None:
    """One component in a plain Lightning loop, with nothing else of the library but its inputs: all of it moves."""
    part: Any = component(name)
    batch, _ = random_batch(tiny_model().input_spec, seed=1, images=1)
    x = torch.randn(*batch.token_ids.shape, 32)
    where = (batch.positions, batch.document_ids, batch.image_ids)
    run: dict[str, Callable[[Any], Tensor]] = {
        "PatchEmbedding": lambda _: part(batch.patches, batch.patch_positions),
        "NativePrimitive": lambda _: part(x, *part.prepare(*where)),
        "PreBuffer": lambda _: part(x, *where),
        "PostLLM": lambda _: part.logits(part(part.embed(batch.token_ids), *where)),
        "Bridge": lambda _: part(x),
    }
    before = {n: p.detach().clone() for n, p in part.named_parameters()}
    unused = {"boundary"}  # belongs to a NEO
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Alone(part, run[name]), DataLoader([0]))
    for n, parameter in part.named_parameters():
        assert torch.equal(parameter, before[n]) is (n in unused), n


def test_primitive_alone_equals_itself_in_a_stack() -> None:
    stack = PreBuffer(1, **SIZES)
    randomize(stack)
    batch, _ = random_batch(tiny_model().input_spec, seed=3)
    where = (batch.positions, batch.document_ids, batch.image_ids)
    x = torch.randn(*batch.token_ids.shape, 32)
    block = stack.layers[0]
    assert torch.equal(stack(x, *where), block(x, *block.prepare(*where)))
    assert torch.equal(stack(x, *where), stack(x, *where, prepare_attention(*where[1:])))


# The loss


def logit_counts(monkeypatch: pytest.MonkeyPatch, model: NEO) -> list[int]:
    """Filled with the number of vectors of each call of the head."""
    counts: list[int] = []
    head = model.post_llm.logits

    def counted(hidden: Tensor) -> Tensor:
        counts.append(hidden.numel() // hidden.shape[-1])
        return head(hidden)

    monkeypatch.setattr(model.post_llm, "logits", counted)
    return counts


def test_training_forms_logits_at_labelled_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, each once forward and once again backward; the loss and gradients are those of all logits at once."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=4)
    out = model(batch)
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none")
    weights = batch.loss_weights[:, 1:].flatten()
    expected = (nll * weights).sum() / weights.sum()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    monkeypatch.setattr(neo_components.model, "LOSS_CHUNK", 4)
    counts = logit_counts(monkeypatch, model)
    loss = model.loss(batch)
    labelled = int((batch.labels != IGNORED).sum())
    chunks = [4] * (labelled // 4) + [labelled % 4] * bool(labelled % 4)
    assert 4 < labelled < batch.labels.numel()
    assert counts == chunks
    loss.backward()
    assert sorted(counts) == sorted(chunks * 2)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name


@pytest.mark.parametrize("images", [0, 1])
def test_nothing_labelled(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """The loss is 0 and its gradients are 0, no logits are formed, and ``forward`` says that there is no loss."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=5, images=images, learn=False)
    assert model(batch).loss is None
    counts = logit_counts(monkeypatch, model)
    loss = model.loss(batch)
    loss.backward()
    assert loss.item() == 0
    assert counts == []
    reached = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(reached) > 40
    assert not any(gradient.any() for gradient in reached)


@pytest.mark.parametrize(("reduction", "power"), [("token", 0.0), ("sample", 1.0), ("square", 0.5)])
def test_weighted_loss_by_hand(reduction: str, power: float) -> None:
    """Documents weigh in as ``1 / n**power`` for each of their n learnt tokens, in the loss of several rows too."""
    model = tiny_model()
    samples = [random_sample(model.input_spec, seed) for seed in (1, 2, 3, 4)]
    top = bottom = 0.0
    with torch.no_grad():
        for sample in samples:
            logits = model(pack([sample], model.input_spec)).logits[0]
            learnt = [(n, int(label)) for n, label in enumerate(sample.labels) if label != IGNORED and n]
            for n, label in learnt:
                weight = len(learnt) ** -power
                top -= weight * float(logits[n - 1].log_softmax(-1)[label])
                bottom += weight
        lengths = [sum(len(sample.token_ids) for sample in half) for half in (samples[:2], samples[2:])]
        rows = [pack(half, model.input_spec, reduction, max(lengths)) for half in (samples[:2], samples[2:])]
        assert float(model.loss(Batch.stack(rows))) == pytest.approx(top / bottom, abs=1e-5)


# The whole


def bridged() -> NEO:
    post = PostLLM(VOCAB, 1, **(SIZES | {"hidden_size": 24}))
    patch = PatchEmbedding(32, width=16, patch_size=4)
    return NEO(patch, PreBuffer(1, **SIZES), post, Bridge(24, 32), Bridge(32, 24))


@pytest.mark.parametrize("kind", ["plain", "tied", "bridged"])
def test_groups(kind: str) -> None:
    """The four wholes are disjoint and add up to the model; H/W parts, word embedding and head are parts of one."""
    model = bridged() if kind == "bridged" else tiny_model(post={"tie_embeddings": kind == "tied"})
    groups = {name: {id(p) for p in parameters} for name, parameters in model.groups().items()}
    assert all(len(groups[name]) == len(parameters) for name, parameters in model.groups().items())
    wholes = ["patch_embedding", "pre_buffer", "post_llm", *(["bridge"] if kind == "bridged" else [])]
    parts = ["post_llm.hw", "post_llm.word_embedding", "post_llm.head"]
    assert set(groups) == {*wholes, *parts}
    assert sum(len(groups[name]) for name in wholes) == len(set().union(*(groups[name] for name in wholes)))
    assert set().union(*(groups[name] for name in wholes)) == {id(p) for p in model.parameters()}
    assert all(groups[part] < groups["post_llm"] for part in parts)
    assert not groups["post_llm.hw"] & (groups["post_llm.word_embedding"] | groups["post_llm.head"])
    assert (groups["post_llm.head"] == groups["post_llm.word_embedding"]) is (kind == "tied")
    by_name = {name: id(p) for name, p in model.named_parameters()}
    new = ("q_proj_hw", "k_proj_hw", "q_norm_h", "q_norm_w", "k_norm_h", "k_norm_w")
    named = {i for name, i in by_name.items() if name.startswith("post_llm") and name.split(".")[-2] in new}
    assert groups["post_llm.hw"] == named
    assert by_name["pre_buffer.boundary"] in groups["pre_buffer"]
    if kind == "bridged":
        assert len(groups["bridge"]) == 4


def test_bridged_model_learns_and_generates() -> None:
    model = bridged()
    randomize(model)
    batch, _ = random_batch(model.input_spec, seed=1, images=1)
    model.loss(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert len(model.generate([random_sample(model.input_spec, 1, learn=False)], max_new_tokens=3)[0]) == 3


def test_a_bridge_fits_an_affine_map() -> None:
    x = torch.randn(200, 6)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    bridge = Bridge(6, 4)
    assert bridge.fit(x, x @ weight.T + bias, ridge=1e-9) < 1e-6
    assert torch.allclose(bridge(x), x @ weight.T + bias, atol=1e-4)
    assert bridge.fit(x, torch.randn(200, 4)) > 0.8


def test_parts_that_do_not_meet_are_refused() -> None:
    pre, narrow = PreBuffer(1, **SIZES), PostLLM(VOCAB, 1, **(SIZES | {"hidden_size": 24}))
    patch = PatchEmbedding(32, width=16, patch_size=4)
    with pytest.raises(ValueError, match=r"bridge_in must map width 24 to 32 .*got none; attach"):
        NEO(patch, pre, narrow)
    with pytest.raises(ValueError, match=r"bridge_out must map width 32 to 24 .*got 24 to 32"):
        NEO(patch, pre, narrow, Bridge(24, 32), Bridge(24, 32))
    with pytest.raises(ValueError, match="of hidden size 16 does not fit a pre-Buffer of hidden size 32"):
        NEO(PatchEmbedding(16, width=16), pre, narrow)
    with pytest.raises(ValueError, match="count positions by different rules: rope 'native' and '1d'"):
        NEO(patch, pre, PostLLM(VOCAB, 1, **SIZES, rope="1d"))
    with pytest.raises(ValueError, match="num_kv_heads must divide num_heads, got 3 and 4"):
        PreBuffer(1, **(SIZES | {"num_kv_heads": 3}))
    with pytest.raises(ValueError, match=r"head_width must be a multiple of 4.*got 6"):
        PreBuffer(1, **(SIZES | {"head_width": 6}))


def test_boundary_vectors_frame_images() -> None:
    """``<img>`` and ``</img>`` come from the pre-Buffer's side even where the vocabulary has rows for them."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=1, images=1)
    with torch.no_grad():
        embedded = model.embed(batch)
        words = model.post_llm.word_embedding(batch.token_ids)
    spec = model.input_spec
    for token_id, vector in zip((spec.image_start_id, spec.image_end_id), model.pre_buffer.boundary, strict=True):
        assert torch.equal(embedded[batch.token_ids == token_id], vector.detach().expand(6, -1))
    text = batch.token_ids < spec.image_token_id
    assert torch.equal(embedded[text], words[text])
    with torch.no_grad():
        tokens = model.patch_embedding(batch.patches, batch.patch_positions)
    assert torch.equal(embedded[batch.image_ids >= 0], tokens)


def test_half_precision() -> None:
    """A bfloat16 model runs forward, backward and generates; its loss is that of float32 within its precision."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=1, images=1)
    expected = model.loss(batch).item()
    half = tiny_model().to(torch.bfloat16)
    loss = half.loss(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.03)
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in half.parameters())
    assert len(half.generate([random_sample(model.input_spec, 1, learn=False)], max_new_tokens=2)[0]) == 2
