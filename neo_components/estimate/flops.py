"""FLOPs of a step, split into the parts of the model: what its matrix products need, as the mask has them.

Counted are matrix products only, 2 FLOPs per multiply-add (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B):
norms, rotary and activation functions are left out. Attention counts the pairs of query and key that the mask shows,
padding counts nothing, and logits are formed at target tokens only. The backward pass counts a gradient only where
something that trains needs it: frozen weights cost none, and nothing flows below the first part that trains. The
FLOPs that activation checkpointing adds are reported apart from the model's FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.attention import NativeAttention
from neo_components.components.block_inputs import BlockInputs
from neo_components.components.layers import GatedFeedForward
from neo_components.components.masks import LayerRule, span_mask
from neo_components.components.moe import SparseFeedForward
from neo_components.components.primitive import NativePrimitive
from neo_components.components.stack import PrimitiveStack
from neo_components.errors import UnknownFlopsError
from neo_components.model.neo import NEO
from neo_components.registry import MASKS
from neo_components.token_indices import document_spans
from neo_components.types import IGNORED, NO_IMAGE, PADDING, Batch, kinds_of

PARTS = ("patch_embedding", "pre_buffer", "post_llm", "head", "bridge")
"""The keys of :func:`step_flops`; ``bridge`` only where there is one."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one part of the model.

    Args:
        forward: of the forward pass.
        backward: of the backward pass, without activation checkpointing.
        again: forward FLOPs that activation checkpointing adds in the backward pass.
    """

    forward: int = 0
    backward: int = 0
    again: int = 0

    @property
    def model(self) -> int:
        """Forward and backward: the numerator of a model FLOP utilization."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.again + other.again)


def step_flops(model: NEO, batch: Batch) -> dict[str, Flops]:
    """FLOPs of a training step on a batch.

    What trains is read off ``requires_grad``, what is checkpointed off ``checkpointed_blocks`` of both stacks. Only the
    ids and labels of the batch are read, and one number per document is read from its device; hand it a batch on
    the CPU where this must not wait for a GPU. Weights may lie on the meta device. For a batch of several processes or
    accumulated batches, add up.

    Args:
        model: the model; see above.
        batch: packed sequences.

    Returns:
        ``Flops`` by part: ``patch_embedding``, ``pre_buffer``, ``post_llm``, ``head``, and ``bridge`` where there is
        one. ``sum(part.model for part in step_flops(model, batch).values())`` over seconds and the device's peak is the
        model FLOP utilization.

    Raises:
        UnknownFlopsError: (a ``ValueError``) for a part of your own whose FLOPs are not known.
    """
    real = batch.document_ids != PADDING
    tokens = int(real.sum())
    targets = int((batch.labels[:, 1:] != IGNORED).sum())
    documents, images, kinds = batch.document_ids, batch.image_ids, batch.token_kinds
    own = model.route.documents(documents, images, batch.token_kinds)
    own_tokens = int((own != PADDING).sum())
    found: dict[str, Flops] = {name: Flops() for name in PARTS if name != "bridge"}
    found["patch_embedding"], image_flow = _patches(model, batch.image_grids)
    words_flow = model.post_llm.word_embedding.weight.requires_grad
    words_enter = words_flow and model.route.words_pass
    flow = image_flow or words_enter or model.pre_buffer.boundary.requires_grad
    bridge = Flops()
    if model.bridge_in is not None:
        bridge += _bridge(model.bridge_in, tokens, words_flow)
        flow = flow or trains(model.bridge_in)
    found["pre_buffer"], flow = stack_flops(model.pre_buffer, own, images, own_tokens, flow, kinds)
    if model.bridge_out is not None:
        bridge += _bridge(model.bridge_out, own_tokens, flow)
        flow = flow or trains(model.bridge_out)
    if model.bridge_in is not None or model.bridge_out is not None:
        found["bridge"] = bridge
    flow = flow or words_flow
    found["post_llm"], flow = stack_flops(model.post_llm, documents, images, tokens, flow, kinds)
    flow = flow or trains(model.post_llm.norm)
    head = model.post_llm.head_weight
    found["head"] = _product(targets, head.shape[0], head.shape[1], flow, head.requires_grad)
    return found


def stack_flops(
    stack: PrimitiveStack, document_ids: Tensor, image_ids: Tensor, tokens: int, flow: bool, token_kinds: Tensor
) -> tuple[Flops, bool]:
    """FLOPs of the blocks of a stack.

    Args:
        stack: pre-Buffer or post-LLM.
        document_ids: [B, L].
        image_ids: [B, L].
        tokens: how many of them are no padding.
        flow: whether what enters the first block needs a gradient.
        token_kinds: [B, L].

    Returns:
        The sum over the blocks, and whether what leaves the last one needs a gradient.
    """
    pairs = {rule: attended_pairs(document_ids, image_ids, rule, token_kinds) for rule in set(stack.layer_rules)}
    total = Flops()
    real = document_ids != PADDING
    for number, block in enumerate(stack.blocks):
        routed = int((chosen_tokens(block, image_ids, token_kinds) & real).sum()) if block.added else 0
        one = block_flops(block, tokens, pairs[block.layer_rule], flow, routed)
        flow = flow or trains(block)
        again = one.forward if number < stack.checkpointed_blocks and flow else 0
        if again and stack.checkpoint_keeps == "products":
            again = _scores(block.self_attn, pairs[block.layer_rule])
        total += Flops(one.forward, one.backward, again)
    return total, flow


def chosen_tokens(block: NativePrimitive, image_ids: Tensor, token_kinds: Tensor) -> Tensor:
    """[B, L] bool: the tokens that pass the feed-forward which expert routing put beside a block's own.

    Raises:
        UnknownFlopsError: (a ``ValueError``) if the routing does not state it.
    """
    if [old for _, old in block.added] != [block.mlp] or not hasattr(block.mlp, "chosen"):
        raise UnknownFlopsError(
            f"the FLOPs of a block with experts {block.hparams.experts!r} are not known: they are where it adds one "
            "feed-forward beside block.mlp, whose method chosen(inputs) gives the tokens of the new one, [B, L] bool"
        )
    routing: Any = block.mlp
    nothing: Any = None
    chosen: Tensor = routing.chosen(BlockInputs(nothing, nothing, image_ids, token_kinds))
    return chosen


def block_flops(block: NativePrimitive, tokens: int, pairs: int, flow: bool, routed: int = 0) -> Flops:
    """FLOPs of one block.

    Args:
        block: the block.
        tokens: that pass it.
        pairs: of query and key that its mask shows, for one head.
        flow: whether its input needs a gradient.
        routed: how many tokens pass the feed-forward that expert routing added, instead of the block's own.
    """
    attention = block.self_attn
    before = flow or trains(block.norms[0])
    total = _attention(attention, tokens, pairs, before)
    within = before or trains(attention) or any(map(trains, block.norms))
    if isinstance(block.mlp, SparseFeedForward):
        return total + _experts(block.mlp, tokens, within)
    total += _gated(block.mlp, tokens - routed, within)
    return total + (_gated(block.added[0][0], routed, within) if routed else Flops())


def _gated(part: nn.Module, tokens: int, flow: bool) -> Flops:
    if not isinstance(part, GatedFeedForward):
        raise UnknownFlopsError(
            f"the FLOPs of a {type(part).__name__} are not known: derive it from GatedFeedForward, of which each "
            "token passes one"
        )
    total = _linear(part.gate_proj, tokens, flow) + _linear(part.up_proj, tokens, flow)
    return total + _linear(part.down_proj, tokens, flow or trains(part.gate_proj) or trains(part.up_proj))


def _attention(part: NativeAttention, tokens: int, pairs: int, flow: bool) -> Flops:
    """Projections, and the two products over the pairs: scores 2E wide, values E wide."""
    groups: dict[str, list[nn.Module | None]] = {
        "q": [part.q_proj, part.q_proj_hw, part.q_norm_h, part.q_norm_w, getattr(part, "q_norm", None)],
        "k": [part.k_proj, part.k_proj_hw, part.k_norm_h, part.k_norm_w, getattr(part, "k_norm", None)],
        "v": [part.v_proj],
    }
    q, k, v = (flow or any(trains(p) for p in group if p is not None) for group in groups.values())
    values = _scores(part, pairs) // 3
    scores = 2 * values
    backward = scores * (q + k) + values * (v + (q or k))
    total = Flops(scores + values, backward)
    for name in ("q_proj", "k_proj", "v_proj", "q_proj_hw", "k_proj_hw"):
        total += _linear(getattr(part, name), tokens, flow)
    return total + _linear(part.o_proj, tokens, q or k or v)


def _scores(part: NativeAttention, pairs: int) -> int:
    """Forward FLOPs of both products over the pairs; of three parts scores take two."""
    return 3 * 2 * pairs * part.q_proj.out_features


def _experts(part: SparseFeedForward, tokens: int, flow: bool) -> Flops:
    """The router, and of the experts those that a token uses."""
    total = _linear(part.gate, tokens, flow)
    used, weights = tokens * part.experts_per_token, part.experts
    first, second = weights.gate_up_proj, weights.down_proj
    total += _product(used, first.shape[1], first.shape[2], flow, first.requires_grad)
    flow = flow or first.requires_grad
    return total + _product(used, second.shape[1], second.shape[2], flow, second.requires_grad)


def _patches(model: NEO, image_grids: Tensor) -> tuple[Flops, bool]:
    """The patch embedding, and whether its tokens need a gradient. Pixels need none."""
    total, flow = Flops(), False
    for product in model.patch_embedding.products(image_grids):
        total += _product(product.rows, product.outputs, product.inputs, flow, product.trained)
        flow = flow or product.trained
    return total, trains(model.patch_embedding)


def _bridge(part: nn.Module, tokens: int, flow: bool) -> Flops:
    """The linear layers of a bridge, one behind the other."""
    linear = {id(p) for layer in part.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
    if odd := [name for name, p in part.named_parameters() if p.ndim > 1 and id(p) not in linear]:
        raise UnknownFlopsError(
            f"the FLOPs of a {type(part).__name__} are not known: build it of nn.Linear; {odd[0]} belongs to none"
        )
    return _linear(part, tokens, flow)


def _linear(part: nn.Module, tokens: int, flow: bool) -> Flops:
    """A linear layer, or one inside another module with adapters beside it, each fed by the one before (LoRA)."""
    total, fed = Flops(), flow
    for index, inner in enumerate(inner for inner in part.modules() if isinstance(inner, nn.Linear)):
        total += _product(tokens, inner.out_features, inner.in_features, fed, inner.weight.requires_grad)
        fed = flow or (index > 0 and inner.weight.requires_grad)
    return total


def _product(tokens: int, out: int, into: int, flow: bool, trains: bool) -> Flops:
    """[tokens, into] x [into, out]: forward, and the gradients of the input and of the weight that are wanted."""
    once = 2 * tokens * out * into
    return Flops(once, once * (flow + trains))


def trains(part: nn.Module) -> bool:
    """Whether any weight of a part gets a gradient."""
    return any(parameter.requires_grad for parameter in part.parameters())


def attended_pairs(document_ids: Tensor, image_ids: Tensor, rule: LayerRule, token_kinds: Tensor | None = None) -> int:
    """How many pairs of query and key the mask shows, padding left out.

    A rule that states how many ``pairs_inside`` an image attend to each other, and is causal elsewhere, is counted from
    the lengths of documents and images; another rule is evaluated for every pair of each document.

    Args:
        document_ids: [B, L].
        image_ids: [B, L]; the tokens of an image lie side by side.
        rule: mask rule and window of a block.
        token_kinds: [B, L]; ``None``: visual tokens and text, as ``image_ids`` has them.
    """
    spans = document_spans(document_ids)
    kinds = kinds_of(image_ids) if token_kinds is None else token_kinds
    pairs_inside = getattr(MASKS[rule.rule], "pairs_inside", None) if isinstance(rule.rule, str) else None
    if pairs_inside is None:
        documents = ((s.sequence, slice(s.start, s.start + s.length)) for s in spans)
        return sum(_pairs_by_mask(image_ids[where], kinds[where], rule) for where in documents)
    total = sum(_causal_pairs(span.length, rule.window) for span in spans)
    for tokens in _image_lengths(document_ids, image_ids):
        total += pairs_inside(tokens) - _causal_pairs(tokens, rule.window)  # a window does not cut through an image
    return total


def _causal_pairs(length: int, window: int | None) -> int:
    """Pairs of a document under plain causal order: token n attends to the last ``min(n, window)``."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _image_lengths(document_ids: Tensor, image_ids: Tensor) -> list[int]:
    """Visual tokens of every image of the batch."""
    sequences = torch.arange(len(image_ids), device=image_ids.device)[:, None].expand_as(image_ids)
    visual = (image_ids != NO_IMAGE) & (document_ids != PADDING)
    owners = torch.stack([sequences, document_ids, image_ids])[:, visual]
    if not owners.shape[1]:
        return []
    lengths: Tensor = torch.unique_consecutive(owners, dim=1, return_counts=True)[1]
    return lengths.tolist()


def _pairs_by_mask(image_ids: Tensor, kinds: Tensor, rule: LayerRule) -> int:
    length = torch.tensor([len(image_ids)], device=image_ids.device)
    return int(span_mask(image_ids[None], length, rule.rule, rule.window, kinds[None]).sum())
