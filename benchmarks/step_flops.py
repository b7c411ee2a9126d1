"""FLOPs that a training step must do, by formulas apart from the library's own count."""

from __future__ import annotations

import torch

from neo_components import NEO, Batch, Sample, pack
from neo_components.components.masks import dense_mask
from neo_components.types import IGNORED


def linear_flops(model: NEO, batch: Batch) -> float:
    """FLOPs of the matrix products with weights in a step that trains the patch embedding, as in stages 1 and 3:
    forward, the gradient of the input (which all but the first need), and that of the weight where it is trained."""
    tokens, patches, embedding = batch.token_ids.numel(), len(batch.patches), model.patch_embedding
    targets = int((batch.labels != IGNORED).sum())
    counts = {
        embedding.patch_proj: patches,
        embedding.token_proj: patches // embedding.group,
        model.post_llm.lm_head: targets,
    }
    total = 0.0
    for part in model.modules():
        if isinstance(part, torch.nn.Linear):
            passes = 1 + (part is not embedding.patch_proj) + part.weight.requires_grad
            total += passes * 2.0 * counts.get(part, tokens) * part.weight.numel()
    if model.post_llm.lm_head is None:  # tied: the head is the word embedding
        head = model.post_llm.head_weight
        total += (2 + head.requires_grad) * 2.0 * targets * head.numel()
    return total


def attention_flops(model: NEO, batch: Batch) -> float:
    """FLOPs of all blocks' attention over the pairs of query and key that the mask shows, forward and backward."""
    pairs = int(dense_mask(batch.document_ids, batch.image_ids).sum())
    stacks = [stack.hparams for stack in (model.pre_buffer, model.post_llm)]
    # Queries times keys are 2E wide, weights times values E; each product has two gradients.
    return sum(3 * 2.0 * pairs * h.num_heads * 3 * h.head_width * h.depth for h in stacks)


def step_flops(model: NEO, samples: list[Sample]) -> float:
    """FLOPs that a step must do."""
    batch = pack(samples, model.input_spec)
    return linear_flops(model, batch) + attention_flops(model, batch)
