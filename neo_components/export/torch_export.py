"""A pre-Buffer as programs of ``torch.export``, for projects that know nothing of this library and load torch alone.

``images.pt2`` is the vision tower: one image in, one vector for each visual token out. ``inputs.pt2`` makes what a
plain causal language model takes in place of token ids: ``inputs_embeds``, with the positions and the mask that belong
to them. Sizes of images and lengths of texts are dynamic; the mask rule is computed inside.

A program is one fixed sequence of tensor operations. So :func:`write_programs` refuses what depends on values of the
input in other ways: RoPE variants other than ``native`` and ``1d`` (their index rules run in Python), rope scaling by
a document's length (it selects a table), experts (each runs on a number of tokens that only the data determines), and
patch embeddings other than NEO's (only its number of tokens per image is known). The language model stays outside.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neo_components.components.masks import LayerRule, dense_mask
from neo_components.components.patch_embeddings.neo import PatchEmbedding
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.ropes.native import Native
from neo_components.components.ropes.one_dimensional import OneDimensional
from neo_components.data.packing import cut_patches
from neo_components.model.neo import NEO
from neo_components.storage.weights import write_text
from neo_components.types import NO_IMAGE, PADDING, TokenKind

FORMAT_VERSION = 1
IMAGES, INPUTS = "images.pt2", "inputs.pt2"


def write_programs(model: NEO, folder: str | Path, image: dict[str, Any] | None = None) -> Path:
    """Writes ``images.pt2``, ``inputs.pt2``, program.json and a README.md.

    A program runs on the device where the model is, whatever device it is loaded on.

    Args:
        model: any model whose pre-Buffer has native or plain positions and no frequencies that depend on length.
        folder: made if absent.
        image: normalization and pixel limits, written to program.json.

    Raises:
        ValueError: if a part of the model cannot be put into a program.
    """
    _check(model.pre_buffer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    try:
        torch.export.save(_image_program(model.pre_buffer), folder / IMAGES)
        torch.export.save(_input_program(model), folder / INPUTS)
    finally:
        model.train(training)
    description = _description(model, image or {})
    write_text(folder / "program.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", _card(description))
    return folder


def _check(pre: PreBuffer) -> None:
    if type(pre.rotary.variant) not in (Native, OneDimensional):  # one derived from them counts otherwise
        raise ValueError(
            f"rope {pre.hparams.rope!r} counts positions by its own Python code, which torch.export cannot write "
            "into a program; use native or 1d"
        )
    if any(rotary.looks_at_length for rotary in pre.rotaries):
        raise ValueError(
            "the frequencies of this pre-Buffer depend on a document's length (rope_scaling longrope or dynamic), so "
            "they are chosen by a value, which torch.export cannot write into a program; export the model by --to hf"
        )
    if pre.hparams.num_experts is not None or pre.expert_modules():
        raise ValueError(
            "a pre-Buffer with experts runs each of them on a number of tokens that depends on the input, which "
            "torch.export cannot write into a program; use a pre-Buffer without experts, or export the model by --to hf"
        )
    if type(pre.patch_embedding) is not PatchEmbedding:
        raise ValueError(
            f"a program knows the tokens of an image for NEO's own patch embedding only, not for "
            f"{type(pre.patch_embedding).__name__}; export the model by --to hf"
        )


class _Dense:
    """Attention under a mask [B, L, L], in operations that ``torch.export`` can write down."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask[:, None]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        heads = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(heads, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.mask, scale=scale).transpose(1, 2)


def _run(pre: PreBuffer, x: Tensor, positions: Tensor, documents: Tensor, images: Tensor, kinds: Tensor) -> Tensor:
    """The pre-Buffer under dense masks; arguments as in ``PreBuffer.forward``."""
    masks = {rule: _Dense(dense_mask(documents, images, *rule, token_kinds=kinds)) for rule in set(pre.layer_rules)}
    return pre(x, positions, documents, images, kinds, attend=[masks[rule] for rule in pre.layer_rules])


class ImageProgram(nn.Module):
    """An image alone, between its two boundary vectors, through patch embedding and pre-Buffer."""

    def __init__(self, pre: PreBuffer) -> None:
        super().__init__()
        self.pre = pre

    def forward(self, image: Tensor) -> Tensor:
        """[C, H, W] normalized pixels, H and W multiples of fold * patch_size, at least two of it -> [h, w, D], one
        vector for each visual token; its mean is one vector for the image."""
        embedding = self.pre.patch_embedding
        assert isinstance(embedding, PatchEmbedding)
        patch, fold = embedding.hparams.patch_size, embedding.hparams.fold
        rows, columns = image.shape[1] // (patch * fold), image.shape[2] // (patch * fold)
        tokens = embedding(cut_patches(image, patch, fold), _patch_positions(rows, columns, fold, image.device))
        count = rows * columns
        x = torch.cat([self.pre.boundary[:1], tokens, self.pre.boundary[1:]])[None]
        index = torch.arange(count + 2, device=image.device)
        visual = (index > 0) & (index <= count)
        inside = (index - 1).clamp(min=0, max=count - 1)
        if isinstance(self.pre.rotary.variant, Native):
            time = torch.where(index > count, 2, (index > 0).long())
            where = torch.stack([time, inside // columns * visual, inside % columns * visual], dim=-1)
        else:
            where = index[:, None].expand(-1, 3)
        images = torch.where(visual, 0, NO_IMAGE)
        kinds = torch.where(visual, TokenKind.VISUAL, TokenKind.BOUNDARY)
        out = _run(self.pre, x, where[None], torch.zeros_like(images)[None], images[None], kinds[None])
        return out[0, 1:-1].unflatten(0, (rows, columns))


def _patch_positions(rows: int, columns: int, fold: int, device: torch.device) -> Tensor:
    """Row and column [P, 2] of an image's patches, as ``packing.patch_grid`` orders them."""
    down, right = torch.arange(rows * fold, device=device), torch.arange(columns * fold, device=device)
    grid = torch.stack([down[:, None].expand(-1, columns * fold), right[None].expand(rows * fold, -1)], dim=-1)
    return grid.reshape(rows, fold, columns, fold, 2).permute(0, 2, 1, 3, 4).reshape(rows * fold * columns * fold, 2)


class InputProgram(nn.Module):
    """All of a model before its language model, for one text with images."""

    def __init__(self, model: NEO) -> None:
        super().__init__()
        self.pre, self.bridge_in, self.bridge_out = model.pre_buffer, model.bridge_in, model.bridge_out
        h = model.post_llm.hparams
        self.ids = (h.image_token_id, h.image_start_id, h.image_end_id)
        self.route, self.rule = model.route, LayerRule.choose(h.attention).rule
        self.native = isinstance(model.pre_buffer.rotary.variant, Native)

    def forward(
        self, token_ids: Tensor, word_embeds: Tensor, patches: Tensor, patch_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the language model takes.

        Args:
            token_ids: [1, L]; a run of the image token for each image.
            word_embeds: [1, L, D] of the language model's own embedding; any values at the positions of images.
            patches: [P, C * patch_size**2] of all images, two visual tokens or more.
            patch_positions: [P, 2] rows and columns.

        Returns:
            ``inputs_embeds`` [1, L, D], ``position_ids`` [1, L], ``attention_mask`` [1, 1, L, L], true where a query
            attends.
        """
        embedding = self.pre.patch_embedding
        assert isinstance(embedding, PatchEmbedding)
        visual = token_ids == self.ids[0]
        number = (visual.long().cumsum(1) - 1).clamp(min=0)
        corner = patch_positions[:: embedding.group] // embedding.hparams.fold
        where = corner[number] * visual[..., None]
        previous = torch.cat([torch.zeros_like(visual[:, :1]), visual[:, :-1]], dim=1)
        first = visual & (~previous | (where == 0).all(-1))
        images = torch.where(visual, first.long().cumsum(1) - 1, NO_IMAGE)
        time = (~visual | first).long().cumsum(1) - 1
        if self.native:
            positions = torch.cat([time[..., None], where], dim=-1)
        else:
            time = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
            positions = time[..., None].expand(-1, -1, 3)
        tokens = embedding(patches, patch_positions)
        x = word_embeds if self.bridge_in is None else self.bridge_in(word_embeds)
        if not self.route.words_pass:
            x = word_embeds.new_zeros(*token_ids.shape, self.pre.hparams.hidden_size)
        for vector, boundary in zip(self.pre.boundary, self.ids[1:], strict=True):
            x = torch.where((token_ids == boundary)[..., None], vector, x)
        x = torch.where(visual[..., None], tokens[number], x)
        boundary = (token_ids == self.ids[1]) | (token_ids == self.ids[2])
        kinds = torch.where(boundary, TokenKind.BOUNDARY, visual.long() * TokenKind.VISUAL)
        document = torch.zeros_like(token_ids)
        own = self.route.documents(document, images, kinds)
        # A word that does not pass is a document of one token: a program cannot select tokens.
        alone = 2 * token_ids.shape[1] + torch.arange(token_ids.shape[1], device=own.device)[None]
        out = _run(self.pre, x, positions, torch.where(own == PADDING, alone, own), images, kinds)
        out = out if self.bridge_out is None else self.bridge_out(out)
        out = torch.where((own != PADDING)[..., None], out, word_embeds) if not self.route.words_pass else out
        return out, time, dense_mask(document, images, self.rule, token_kinds=kinds)[:, None]


def _image_program(pre: PreBuffer) -> Any:
    assert pre.patch_embedding is not None
    h = pre.patch_embedding.hparams
    side = h.patch_size * h.fold
    rows, columns = torch.export.Dim("rows", min=2, max=4096), torch.export.Dim("columns", min=2, max=4096)
    example = pre.boundary.new_zeros(h.channels, 3 * side, 5 * side)
    return _export(ImageProgram(pre), (example,), ({1: side * rows, 2: side * columns},))


def _input_program(model: NEO) -> Any:
    h, width = model.patch_embedding.hparams, model.post_llm.hparams.hidden_size
    group = h.fold**2
    length, tokens = torch.export.Dim("length", min=3, max=2**20), torch.export.Dim("tokens", min=2, max=2**20)
    like = model.pre_buffer.boundary  # its type and device are the program's
    ids = torch.full((1, 11), model.post_llm.hparams.image_token_id, device=like.device)
    ids[0, :2], ids[0, 9:] = 1, 2
    example = (
        ids, like.new_zeros(1, 11, width), like.new_zeros(7 * group, h.channels * h.patch_size**2),
        ids.new_zeros(7 * group, 2),
    )  # fmt: skip
    return _export(InputProgram(model), example, ({1: length}, {1: length}, {0: group * tokens}, {0: group * tokens}))


def _export(module: nn.Module, example: tuple[Tensor, ...], dynamic: tuple[Any, ...]) -> Any:
    """The program, on the example's device; its weights are copies of the module's."""
    run: Callable[..., Any] = torch.export.export
    with torch.no_grad():
        return run(module.eval(), example, dynamic_shapes=dynamic, strict=False)


def _description(model: NEO, image: dict[str, Any]) -> dict[str, Any]:
    """program.json."""
    spec, llm = model.input_spec, model.post_llm.hparams
    return {
        "library": "neo_components",
        "kind": "programs",
        "format_version": FORMAT_VERSION,
        "torch": torch.__version__.split("+")[0],
        "dtype": str(model.pre_buffer.boundary.dtype).removeprefix("torch."),
        "device": model.pre_buffer.boundary.device.type,
        "image_token_id": llm.image_token_id,
        "image_start_id": llm.image_start_id,
        "image_end_id": llm.image_end_id,
        "patch_size": spec.patch_size,
        "fold": spec.fold,
        "channels": spec.channels,
        "image_width": model.pre_buffer.hparams.hidden_size,
        "language_model_width": llm.hidden_size,
        "text": model.text,
        "image": image,
    }


def _card(description: dict[str, Any]) -> str:
    side = description["patch_size"] * description["fold"]
    return (
        "---\nlibrary_name: pytorch\n---\n# Programs of a native vision-language model's pre-Buffer\n\n"
        f"Load them by `torch.export.load(NAME).module()`. `{IMAGES}`: [{description['channels']}, H, W] normalized "
        f"pixels, multiples of {side}, to [H / {side}, W / {side}, {description['image_width']}]. `{INPUTS}`: "
        "token ids, word embeddings, patches and their positions to inputs_embeds, position_ids and attention_mask of "
        "a causal language model.\n"
    )
