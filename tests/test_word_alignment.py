"""The auxiliary loss that draws visual tokens to the words of the answers (training/word_alignment.py)."""

from __future__ import annotations

import math

import pytest
import torch
from builders import random_batch, tiny_model
from torch import Tensor

from neo_components import NEO, Batch, Sample, pack
from neo_components.recipe.stage import StageConfig
from neo_components.training.module import NEOTraining
from neo_components.training.word_alignment import (
    LENGTH_WEIGHT,
    TEMPERATURE,
    ImageAnswers,
    WordAlignment,
    word_alignment,
)


@pytest.fixture(scope="module")
def model() -> NEO:
    return tiny_model()


def sample(model: NEO, words: list[int], images: int = 1) -> Sample:
    """An image of 2 x 2 visual tokens for each of ``images``, then answers."""
    spec = model.input_spec
    ids = [spec.image_start_id, *[spec.image_token_id] * 4, spec.image_end_id] * images + [1, *words]
    labels = torch.full((len(ids),), -100)
    labels[len(ids) - len(words) :] = torch.tensor(words)
    side = 2 * spec.factor
    return Sample(torch.tensor(ids), labels, [torch.randn(3, side, side) for _ in range(images)])


def batch_of(model: NEO, *answers: list[int]) -> Batch:
    return pack([sample(model, words) for words in answers], model.input_spec)


def test_the_answers_of_each_document(model: NEO) -> None:
    """Token 9 is common: all documents end with it. Text alone says nothing of an image."""
    answers = [[10, 11, 9], [12, 12, 9], [11, 9], [9], *[[20 + n, 9] for n in range(12)]]
    samples = [sample(model, words) for words in answers]
    samples.insert(1, sample(model, [10, 13, 9], images=0))
    answers = ImageAnswers.of(pack(samples, model.input_spec))
    assert answers is not None
    assert answers.words.tolist() == [10, 11, 12, *range(20, 32)]
    assert answers.hits[:3, :3].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    assert answers.hits.shape == (15, 15)  # the fourth document has nothing to say but 9
    torch.testing.assert_close(answers.frequency[:3], torch.tensor([1, 2, 1]) / 16)
    assert answers.visual.tolist()[:5] == [1, 2, 3, 4, 1 + len(samples[0].token_ids) + len(samples[1].token_ids)]
    assert answers.document.tolist() == [row for row in range(15) for _ in range(4)]


def test_text_alone_has_no_image_to_answer_about(model: NEO) -> None:
    assert ImageAnswers.of(pack([sample(model, [10, 11], images=0)], model.input_spec)) is None


def test_the_loss_by_hand(model: NEO) -> None:
    """Two documents of two visual tokens each; the first points to its word, the second to the other's."""
    answers = ImageAnswers(
        torch.tensor([3, 4]), torch.eye(2), torch.tensor([0.5, 0.5]), torch.arange(4), torch.tensor([0, 0, 1, 1])
    )  # fmt: skip
    words = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0]])
    center = torch.tensor([0.0, 0.0, 1.0])
    x = torch.tensor([[[3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]]])
    found = word_alignment(x, answers, words, center, torch.tensor(1.5))
    right, wrong = math.log1p(math.exp(-1 / TEMPERATURE)), 1 / TEMPERATURE + math.log1p(math.exp(-1 / TEMPERATURE))
    assert float(found) == pytest.approx((right + wrong) / 2 + LENGTH_WEIGHT * math.log(2) ** 2, rel=1e-5)


def test_the_loss_looks_at_what_enters_the_language_model(model: NEO) -> None:
    batch = batch_of(model, [10, 11], [12], [13, 14])
    alignment = WordAlignment(model.train())
    with alignment.watching():
        model.loss(batch)
    assert not model.post_llm._forward_pre_hooks
    found = alignment.loss(batch)
    answers = ImageAnswers.of(batch)
    assert found is not None
    assert answers is not None
    x = model._before_llm(batch, None, None)
    table = model.post_llm.word_embedding.weight
    expected = word_alignment(x, answers, table[answers.words], table.mean(0), table.norm(dim=-1).median())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def train_step(model: NEO, batch: Batch, weight: float) -> dict[str, Tensor]:
    module = NEOTraining(model, StageConfig(train=("all",), word_alignment=weight))
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign,misc]
    module._trainer = type("OneBatch", (), {"accumulate_grad_batches": 1, "world_size": 1})()  # type: ignore[assignment]
    model.zero_grad()
    module.training_step(batch, 0).backward()
    return logged


def test_it_is_added_with_its_weight_and_teaches_the_parts_before_the_language_model_only() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    batch = batch_of(model, [10, 11], [12], [13, 14])
    gradients = []
    for weight in (0.0, 0.5, 1.0):
        logged = train_step(model, batch, weight)
        assert ("train/word_alignment" in logged) is (weight > 0)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, plain in gradients[0].items():
        half, whole = gradients[1][name] - plain, gradients[2][name] - plain
        torch.testing.assert_close(2 * half, whole, rtol=1e-3, atol=1e-5)
        before = name.startswith(("pre_buffer", "patch_embedding"))
        assert before or float(whole.abs().max()) < 1e-5, name
    moved = [
        name for name in gradients[0] if "pre_buffer.layers" in name and (gradients[2][name] - gradients[0][name]).any()
    ]
    assert len(moved) > 5


def test_training_with_it_brings_visual_tokens_to_their_words() -> None:
    torch.manual_seed(0)
    model = tiny_model()
    batch = batch_of(model, [10, 11], [12], [13, 14], [15])
    alignment = WordAlignment(model.train())
    optimizer = torch.optim.AdamW([*model.pre_buffer.parameters()], lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with alignment.watching():
            model.loss(batch)
        loss = alignment.loss(batch)
        assert loss is not None
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_batch_without_an_image_has_none(model: NEO) -> None:
    batch, _ = random_batch(model.input_spec, seed=3, images=0)
    alignment = WordAlignment(model.train())
    with alignment.watching():
        model.loss(batch)
    assert alignment.loss(batch) is None
