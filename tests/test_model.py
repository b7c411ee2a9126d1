"""NEO as a whole: its loss, its groups of parameters, and how its parts meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builders import SIZES, VOCAB, random_batch, random_sample, randomize, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neo_components import (
    NEO,
    Batch,
    Bridge,
    PatchEmbedding,
    PostLLM,
    PreBuffer,
    pack,
)
from neo_components.components import token_loss
from neo_components.components.bridge import LeastSquares
from neo_components.types import IGNORED


class Logits(TorchDispatchMode):
    """Counts the vectors of every tensor of V columns that an operation makes, other than the head and its gradient."""

    def __init__(self, model: NEO) -> None:
        super().__init__()
        self.head = tuple(model.post_llm.head_weight.shape)
        self.products: list[int] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.shape[-1:] == self.head[:1] and tuple(out.shape) != self.head[::-1]:
            vectors = out.numel() // out.shape[-1]
            self.most = max(self.most, vectors)
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                self.products.append(vectors)
        return out


def test_training_forms_logits_at_labelled_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, and each once; the loss and gradients are those of all logits at once."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=4)
    out = model(batch)
    nll = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none")
    weights = batch.loss_weights[:, 1:].flatten()
    expected = (nll * weights).sum() / weights.sum()
    expected.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    monkeypatch.setattr(token_loss, "CHUNK", 4)
    monkeypatch.setattr(token_loss, "LOGITS", 0)
    labelled = int((batch.labels != IGNORED).sum())
    chunks = [4] * (labelled // 4) + [labelled % 4] * bool(labelled % 4)
    assert 4 < labelled < batch.labels.numel()
    with Logits(model) as logits:
        loss = model.loss(batch)
        assert logits.products == chunks
        loss.backward()
    assert logits.products == chunks
    assert logits.most == 4
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name
    with pytest.raises(RuntimeError, match="can be taken once"):
        again = model.loss(batch)
        again.backward(retain_graph=True)
        again.backward()


def test_a_frozen_head_costs_no_gradient() -> None:
    """Nothing of the head's shape is made; neither are logits kept for the validation loss."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=4)
    for learns in (True, False):
        model.post_llm.lm_head.requires_grad_(learns)
        made: list[tuple[int, ...]] = []

        class Shapes(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                out = func(*args, **(kwargs or {}))
                if func is torch.ops.aten.mm.default and isinstance(out, Tensor):
                    made.append(tuple(out.shape))  # noqa: B023
                return out

        with Shapes():
            model.loss(batch).backward()
        assert (tuple(model.post_llm.head_weight.shape) in made) == learns


@pytest.mark.parametrize("images", [0, 1])
def test_nothing_labelled(images: int) -> None:
    """The loss is 0 and its gradients are 0, no logits are formed, and ``forward`` says that there is no loss."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=5, images=images, learn=False)
    with Logits(model) as logits:
        assert model(batch).loss is None
    assert logits.products == [batch.token_ids.numel()]
    with Logits(model) as logits:
        loss = model.loss(batch)
        loss.backward()
    assert loss.item() == 0
    assert logits.products == []
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


def test_size_of_the_weights_cancels_until_it_vanishes() -> None:
    """``sum(w * nll) / max(sum(w), 1e-5)``: small weights give the same mean, vanishing ones nothing."""
    model = tiny_model()
    batch, _ = random_batch(model.input_spec, seed=4)
    whole = float(batch.loss_weights[:, 1:].sum())
    with torch.no_grad():
        expected = float(model.loss(batch))
        batch.loss_weights *= 1e-3 / whole
        assert float(model.loss(batch)) == pytest.approx(expected, rel=1e-4)
        batch.loss_weights *= 1e-4
        assert float(model.loss(batch)) == pytest.approx(expected * 1e-7 / 1e-5, rel=1e-4)


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
    parts = ["post_llm.hw", "post_llm.blocks", "post_llm.word_embedding", "post_llm.head"]
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
    assert named < groups["post_llm.blocks"]
    words = groups["post_llm.word_embedding"] | groups["post_llm.head"]
    assert groups["post_llm.blocks"] == groups["post_llm"] - words
    assert by_name["pre_buffer.boundary"] in groups["pre_buffer"]
    if kind == "bridged":
        assert len(groups["bridge"]) == 4


def test_text_is_led_another_way() -> None:
    model = bridged()
    with pytest.raises(ValueError, match="must be one of shared, bypass"):
        model.lead_text("no path")
    model.lead_text("bypass")
    assert (model.text, model.bridge_in) == ("bypass", None)
    with pytest.raises(ValueError, match="no bridge into its pre-Buffer"):
        model.lead_text("shared")
    plain = tiny_model()
    batch, _ = random_batch(plain.input_spec, seed=1, images=1)
    losses = [float(plain.loss(batch).detach())]
    for text in ("bypass", "shared"):
        plain.lead_text(text)
        losses.append(float(plain.loss(batch).detach()))
    assert losses[0] == losses[2] != losses[1]


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
    bridge = LeastSquares(6, 4, ridge=1e-9)
    bridge.fit(x, x @ weight.T + bias)
    assert 0 <= bridge.unexplained < 1e-6
    assert torch.allclose(bridge(x), x @ weight.T + bias, atol=1e-4)
    assert (bridge.unexplained_left_out or 1.0) < 1e-6
    bridge.fit(x, torch.randn(200, 4))
    assert bridge.unexplained > 0.8


@pytest.mark.parametrize("pairs", [12, 40])
def test_left_out_errors_of_one_fit_equal_those_of_a_fit_for_each_pair(pairs: int) -> None:
    """The mean is left out too, and the penalty is that of the whole, whose share of one pair is small."""
    x, ridge = torch.randn(pairs, 20).double(), 0.1
    y = x[:, :4] + torch.randn(pairs, 4)
    bridge = LeastSquares(20, 4, ridge)
    bridge.fit(x, y)
    penalty = ridge * (x - x.mean(0)).square().sum() / 20
    missed = 0.0
    for left in range(pairs):
        kept = torch.arange(pairs) != left
        middle, goal = x[kept].mean(0), y[kept].mean(0)
        a, b = x[kept] - middle, y[kept] - goal
        weight = torch.linalg.solve(a.T @ a + penalty * torch.eye(20).double(), a.T @ b)
        missed += float((y[left] - goal - (x[left] - middle) @ weight).square().sum())
    whole = float((y - y.mean(0)).square().sum())
    assert bridge.unexplained_left_out == pytest.approx(missed / whole, rel=1e-6)
    assert (bridge.unexplained or 1.0) < missed / whole


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


def test_recomputed_blocks_give_the_same_gradients_from_less() -> None:
    """Bit for bit, and what is kept for the backward pass shrinks with the blocks."""
    batch, _ = random_batch(tiny_model().input_spec, seed=3)
    losses, gradients, kept = [], [], []
    for share in (0, 1, 2):
        model = tiny_model()
        for stack in (model.pre_buffer, model.post_llm):
            stack.checkpointed_blocks = share
        sizes: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x)
        with hooks:
            loss = model.loss(batch)
        kept.append(sum(sizes))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    assert kept[0] > 1.4 * kept[1] > 1.4 * 1.4 * kept[2]
    for other in (1, 2):
        assert torch.equal(losses[0], losses[other])
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], gradients[other], strict=True))
