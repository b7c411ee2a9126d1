"""NEO as a textbook would write it: for tests and benchmarks to compare with, slow and plain.

Convolutions over images padded to one size, a dense mask over the whole row, rotary tables computed in every block,
keys and values repeated for every query head, and the logits of every token. Only NEO's own arguments (Qwen3, native
RoPE, mixed attention) are read. Source: NEO paper section 3.1 and equations 1 to 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neo_components import NEO, Batch, Sample
from neo_components.types import IGNORED, NO_IMAGE


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def turn(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Rotates [B, heads, L, width] by positions [B, L], pair k being channels k and k + width/2."""
    width = x.shape[-1]
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32, device=x.device) / width)
    angle = (position[..., None].float() * frequency)[:, None]
    first, second = x.chunk(2, dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Attention(nn.Module):
    def __init__(self, h: dict) -> None:
        super().__init__()
        self.h = h
        width, queries, keys = h["head_width"], h["num_heads"] * h["head_width"], h["num_kv_heads"] * h["head_width"]
        for name, size in (("q", queries), ("k", keys)):
            self.add_module(f"{name}_proj", nn.Linear(h["hidden_size"], size, bias=False))
            self.add_module(f"{name}_proj_hw", nn.Linear(h["hidden_size"], size, bias=False))
            self.add_module(f"{name}_norm", Norm(width, h["norm_eps"]))
            self.add_module(f"{name}_norm_h", Norm(width // 2, h["norm_eps"]))
            self.add_module(f"{name}_norm_w", Norm(width // 2, h["norm_eps"]))
        self.v_proj = nn.Linear(h["hidden_size"], keys, bias=False)
        self.o_proj = nn.Linear(queries, h["hidden_size"], bias=False)

    def part(self, name: str, x: Tensor, positions: Tensor) -> Tensor:
        """Queries or keys: [B, heads, L, 2E] of T, H and W channels, normed and rotated."""
        width = self.h["head_width"]
        t = getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, width)).transpose(1, 2)
        both = getattr(self, f"{name}_proj_hw")(x).unflatten(-1, (-1, width)).transpose(1, 2)
        t = turn(getattr(self, f"{name}_norm")(t), positions[..., 0], self.h["base_t"])
        h = turn(getattr(self, f"{name}_norm_h")(both[..., : width // 2]), positions[..., 1], self.h["base_h"])
        w = turn(getattr(self, f"{name}_norm_w")(both[..., width // 2 :]), positions[..., 2], self.h["base_w"])
        return torch.cat([t, h, w], dim=-1)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        q, k = self.part("q", x, positions), self.part("k", x, positions)
        v = self.v_proj(x).unflatten(-1, (-1, self.h["head_width"])).transpose(1, 2)
        group = self.h["num_heads"] // self.h["num_kv_heads"]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, mask[:, None], scale=self.h["head_width"] ** -0.5)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, h: dict) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(h["hidden_size"], h["feed_forward_size"], bias=False)
        self.up_proj = nn.Linear(h["hidden_size"], h["feed_forward_size"], bias=False)
        self.down_proj = nn.Linear(h["feed_forward_size"], h["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, h: dict) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(h), FeedForward(h)
        self.input_layernorm = Norm(h["hidden_size"], h["norm_eps"])
        self.post_attention_layernorm = Norm(h["hidden_size"], h["norm_eps"])

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Pictures(nn.Module):
    """The two convolutions, over all images padded to the largest one."""

    def __init__(self, h: dict) -> None:
        super().__init__()
        self.base, self.side, self.fold = h["base"], h["patch_size"], h["fold"]
        self.patch_proj = nn.Conv2d(h["channels"], h["width"], self.side, self.side)
        self.token_proj = nn.Conv2d(h["width"], h["hidden_size"], self.fold, self.fold)

    def forward(self, images: list[Tensor]) -> Tensor:
        sizes = [image.shape[1:] for image in images]
        high, wide = max(size[0] for size in sizes), max(size[1] for size in sizes)
        padded = torch.stack([F.pad(image, (0, wide - image.shape[2], 0, high - image.shape[1])) for image in images])
        features = F.gelu(self.patch_proj(padded))
        rows, columns = features.shape[2:]
        half = features.shape[1] // 2
        frequency = self.base ** (-torch.arange(0, half, 2, dtype=torch.float32, device=padded.device) / half)
        places = [torch.arange(size, device=padded.device) for size in (rows, columns)]
        column = (frequency[:, None, None] * places[1]).expand(-1, rows, columns)
        row = (frequency[:, None, None] * places[0][:, None]).expand(-1, rows, columns)
        angle = torch.cat([column, row])
        even, odd = features[:, 0::2], features[:, 1::2]
        both = even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()
        tokens = self.token_proj(torch.stack(both, dim=2).flatten(1, 2))
        step = self.side * self.fold
        cut = [t[:, : size[0] // step, : size[1] // step].flatten(1).T for t, size in zip(tokens, sizes, strict=True)]
        return torch.cat(cut)


class ReferenceNEO(nn.Module):
    """The same model with the same weights, and the same parameters frozen.

    Args:
        model: a NEO of default arguments, untied.
    """

    def __init__(self, model: NEO) -> None:
        super().__init__()
        pre, post, patch = model.pre_buffer, model.post_llm, model.patch_embedding
        self.ids = (post.hparams.image_start_id, post.hparams.image_end_id)
        self.pictures = Pictures(dict(patch.hparams))
        self.boundary = nn.Parameter(pre.boundary.detach().clone())
        self.blocks = nn.ModuleList(
            Block(dict(stack.hparams)) for stack in (pre, post) for _ in range(stack.hparams.depth)
        )
        self.embedding = nn.Embedding.from_pretrained(post.word_embedding.weight.detach().clone(), freeze=False)
        self.norm = Norm(post.hparams.hidden_size, post.hparams.norm_eps)
        assert post.lm_head is not None
        self.head = nn.Linear(post.lm_head.in_features, post.lm_head.out_features, bias=False)
        self._copy(model)

    def _copy(self, model: NEO) -> None:
        """Takes over weights and what is frozen."""
        parts = [(self.head, model.post_llm.lm_head), (self.norm, model.post_llm.norm)]
        parts += [(self.embedding, model.post_llm.word_embedding)]
        parts += zip(self.blocks, [*model.pre_buffer.layers, *model.post_llm.layers], strict=True)
        parts += [(self.pictures, model.patch_embedding)]
        self.boundary.requires_grad_(model.pre_buffer.boundary.requires_grad)
        for mine, theirs in parts:
            own = dict(mine.named_parameters())
            for name, parameter in theirs.named_parameters():
                weight = parameter.detach().clone()
                own[name].data = as_convolution(name, weight, own[name]) if own[name].ndim == 4 else weight
                own[name].requires_grad_(parameter.requires_grad)

    def loss(self, batch: Batch, images: list[Tensor]) -> Tensor:
        """Weighted mean over the labelled tokens; ``images`` [C, H, W] of the batch in order."""
        x = self.embedding(batch.token_ids.clamp(max=self.embedding.num_embeddings - 1))
        for vector, token_id in zip(self.boundary, self.ids, strict=True):
            x = torch.where((batch.token_ids == token_id)[..., None], vector.to(x.dtype), x)
        if images:
            x = x.masked_scatter((batch.image_ids != NO_IMAGE)[..., None], self.pictures(images).to(x.dtype))
        place = torch.arange(x.shape[1], device=x.device)
        document, image = batch.document_ids, batch.image_ids
        same_image = (image[:, :, None] == image[:, None]) & (image != NO_IMAGE)[:, None]
        mask = (document[:, :, None] == document[:, None]) & ((place[:, None] >= place) | same_image)
        for block in self.blocks:
            x = block(x, batch.positions, mask)
        logits = self.head(self.norm(x))[:, :-1].float()
        target, weight = batch.labels[:, 1:], batch.loss_weights[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
        return (nll * weight.flatten()).sum() / weight.sum().clamp(min=1e-5)


def as_convolution(name: str, weight: Tensor, like: Tensor) -> Tensor:
    """A linear layer's weight over cut-out patches as that of a convolution.

    The first projection reads (channel, y, x), the second the patches of a visual token one after the other.
    """
    out, channels, side, _ = like.shape
    if name == "patch_proj.weight":
        return weight.reshape(out, channels, side, side)
    return weight.reshape(out, side, side, channels).permute(0, 3, 1, 2).contiguous()


def images_of(samples: list[Sample]) -> list[Tensor]:
    """All images of a row in order."""
    return [image for sample in samples for image in sample.images]
