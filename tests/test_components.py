"""The components one by one: what they compute, that they learn, that they stand alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from builders import SIZES, VOCAB, by_section, random_batch, random_image, randomize, text_inputs, tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from neo_components import (
    NEO,
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
from neo_components.components.layers import NORMS, RMSNorm
from neo_components.components.moe import SparseFeedForward
from neo_components.components.ropes.native import Native
from neo_components.data.packing import patchify

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
    spec = InputSpec(0, 1, 2, 3, patch_size, fold, channels, Native().positions)
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


def test_whitening_decorrelates_what_the_first_projection_sees() -> None:
    torch.manual_seed(0)
    layer = PatchEmbedding(16, width=48, patch_size=4, channels=1)
    mixing = torch.randn(16, 16) @ torch.diag(torch.tensor([30.0, *[1.0] * 15])) @ torch.randn(16, 16)
    patches = torch.randn(4000, 16) @ mixing + 5.0
    layer.whiten(patches, ridge=0.0)
    features = layer.patch_proj(patches)
    torch.testing.assert_close(features.mean(0), torch.zeros(48), atol=1e-3, rtol=0)
    assert float(features.std()) == pytest.approx(1.0, abs=0.01)
    # On white pixels every direction of the pixels counts alike: the map from them to the features is the random one.
    covariance = (patches - patches.mean(0)).T @ (patches - patches.mean(0)) / len(patches)
    seen = layer.patch_proj.weight @ covariance @ layer.patch_proj.weight.T
    values = torch.linalg.eigvalsh(seen)[-16:]
    assert float(values.max() / values.min()) < 20  # 48 x 16 random numbers; of the raw pixels it is over 1000
    raw = PatchEmbedding(16, width=48, patch_size=4, channels=1).patch_proj.weight
    raw_values = torch.linalg.eigvalsh(raw @ covariance @ raw.T)[-16:]
    assert float(raw_values.max() / raw_values.min()) > 1000


@pytest.mark.parametrize("patches", [torch.randn(47, 48), torch.ones(99, 48)])
def test_whitening_refuses_too_few_patches_and_equal_ones(patches: Tensor) -> None:
    with pytest.raises(ValueError, match="at least as many patches"):
        PatchEmbedding(16, width=8, patch_size=4).whiten(patches)


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
    llm.init_new_from_llm()
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
    attention(torch.randn(1, 20, 32), text_inputs(llm.rotary(positions), attend))
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


def test_queries_of_a_partly_turning_head_start_from_its_fastest_pairs() -> None:
    """Of 16 channels 12 turn, pair k of them joining k and k + 6: the four fastest pairs are rows 0-3 and 6-9."""
    llm = PostLLM(VOCAB, 1, **(SIZES | {"head_width": 16}), rotary_width=12)
    randomize(llm)
    llm.init_new_from_llm()
    attention = llm.layers[0].self_attn
    t, hw = attention.q_proj.weight.view(4, 16, 32), attention.q_proj_hw.weight.view(4, 16, 32)
    rows = [0, 1, 2, 3, 6, 7, 8, 9]
    assert torch.equal(hw, t[:, rows + rows])
    few = PostLLM(VOCAB, 1, **SIZES, rotary_width=2)  # one pair turns; the second is the first of those that rest
    few.init_new_from_llm()
    attention = few.layers[0].self_attn
    t, hw = attention.q_proj.weight.view(4, 8, 32), attention.q_proj_hw.weight.view(4, 8, 32)
    assert torch.equal(hw, t[:, [0, 2, 1, 5] * 2])


def test_experts_by_hand() -> None:
    """Each token's likeliest experts, one by one, weighted by their share of the probability."""
    layer = SparseFeedForward(6, 5, num_experts=4, experts_per_token=2)
    randomize(layer, std=1.0)
    x = torch.randn(2, 7, 6)
    weights = layer.experts
    expected = torch.zeros_like(x)
    for place in [(row, token) for row in range(2) for token in range(7)]:
        shares = layer.gate(x[place]).softmax(-1)
        first, second = shares.argsort(descending=True)[:2].tolist()
        for expert in (first, second):
            gate, up = weights.gate_up_proj[expert, :5] @ x[place], weights.gate_up_proj[expert, 5:] @ x[place]
            out = weights.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            expected[place] += out * shares[expert] / (shares[first] + shares[second])
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert torch.allclose(layer(x[:1, :1]), expected[:1, :1], atol=1e-5)
    assert layer(x[:, :0]).shape == (2, 0, 6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qk_norm": "most"}, "qk_norm must be one of head, whole, none, got 'most'"),
        ({"norm": "layer"}, "norm must be one of weight, one_plus_weight, got 'layer'"),
        ({"norm_placement": "beside"}, "norm_placement must be one of before, after, both, got 'beside'"),
        ({"activation": "relu"}, "activation must be one of silu, gelu_tanh, got 'relu'"),
        ({"window": 0}, "window must be 1 or more, or None for all tokens, got 0"),
        ({"rotary_width": 3}, "rotary_width must be even and lie in 0 to head_width (8), got 3"),
        ({"rotary_width": 10}, "rotary_width must be even and lie in 0 to head_width (8), got 10"),
        ({"num_experts": 2}, "experts_per_token must lie in 1 to num_experts (2), got 8"),
        ({"num_experts": 8, "feed_forward_bias": True}, "feed_forward_bias is not supported beside num_experts"),
        ({"rope_scaling": {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported (supported: linear, "),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling of rope_type 'linear' lacks factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "pi": 3}}, "rope_type 'linear' has no pi"),
        (
            {"rotary_width": 2, "rope_scaling": {
                "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8,
            }},
            "rope_scaling of rope_type 'dynamic' needs 4 or more rotated channels, got 2",
        ),
    ],
)  # fmt: skip
def test_arguments_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        PreBuffer(1, **SIZES, **wrong)
    assert message in str(error.value)


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
        "NativePrimitive": lambda _: part(x, part.prepare(*where)),
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
    assert torch.equal(stack(x, *where), block(x, block.prepare(*where)))
    assert torch.equal(stack(x, *where), stack(x, *where, attend=prepare_attention(*where[1:])))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 3, "window_layers": [0, 2]}, "window_layers names block 2, but a depth of 2 has 0 to 1"),
        ({"nope_layers": [-1]}, "nope_layers names block -1"),
        ({"window_base_t": 1e4}, "window_base_t has no effect without window, which is not given"),
        ({"expert_layers": [1]}, "expert_layers has no effect without num_experts"),
    ],
)
def test_blocks_that_are_not_there(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        PostLLM(VOCAB, 2, **SIZES, **wrong)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", NORMS)
def test_norm_equals_that_of_torch(dtype: torch.dtype, form: str) -> None:
    """The output bit for bit; gradients of x and gain against torch's own autograd."""
    torch.manual_seed(0)
    norm = RMSNorm(24, 1e-5, form)
    torch.nn.init.normal_(norm.weight)
    x, grad = torch.randn(3, 5, 24).to(dtype).requires_grad_(), torch.randn(3, 5, 24).to(dtype)
    y, weight = x.detach().clone().requires_grad_(), norm.weight.detach().clone().requires_grad_()
    expected = torch.nn.functional.rms_norm(y.float(), (24,), weight + norm.offset, 1e-5).to(dtype)
    ours = norm(x)
    assert torch.equal(ours, expected)
    ours.backward(grad)
    expected.backward(grad)
    assert torch.allclose(x.grad, y.grad, atol=2e-6 if dtype == torch.float32 else 2e-2)
    assert torch.allclose(norm.weight.grad, weight.grad, atol=1e-5)
    norm.requires_grad_(False)
    x.grad = norm.weight.grad = None
    norm(x).backward(grad)
    assert torch.allclose(x.grad, y.grad, atol=2e-6 if dtype == torch.float32 else 2e-2)
    assert norm.weight.grad is None
