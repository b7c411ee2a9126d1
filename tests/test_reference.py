"""The textbook NEO and the library's give the same loss and the same gradients."""

from __future__ import annotations

import torch
from builders import random_sample, tiny_model
from reference_neo import ReferenceNEO, images_of

from neo_components import pack
from neo_components.training.groups import train_only

STAGE_1 = ["patch_embedding", "pre_buffer", "post_llm.hw"]


def test_loss_and_gradients_are_those_of_the_textbook() -> None:
    for groups in (STAGE_1, ["all"]):
        model = tiny_model()
        train_only(model, groups)
        samples = [random_sample(model.input_spec, seed, images=seed % 3, text=(3, 90)) for seed in range(5)]
        batch = pack(samples, model.input_spec, row_length=sum(len(s.token_ids) for s in samples) + 5)
        reference = ReferenceNEO(model)
        ours, theirs = model.loss(batch), reference.loss(batch, images_of(samples))
        assert torch.allclose(ours, theirs, atol=1e-5)
        ours.backward()
        theirs.backward()
        stacks = [*model.pre_buffer.layers, *model.post_llm.layers]
        for block, plain in zip(stacks, reference.blocks, strict=True):
            for (name, a), (other, b) in zip(
                sorted(block.named_parameters()), sorted(plain.named_parameters()), strict=True
            ):
                assert name == other
                assert (a.grad is None) == (b.grad is None)
                if a.grad is not None:
                    assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-4), name
