"""NEO: patch embedding, pre-Buffer and post-LLM joined into a native vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from neo_components.components.backends import Attend, EagerAttention
from neo_components.components.bridge import Bridge
from neo_components.components.component import Component
from neo_components.components.masks import LayerRule
from neo_components.components.patch_embedding import PatchEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.stack import Prepared
from neo_components.components.token_loss import token_loss
from neo_components.data.packing import pack
from neo_components.model.generation import generate
from neo_components.model.layouts import (
    layout_of,
    load_released,
    own_config,
    parts_from_own,
    parts_from_released,
    save_released,
)
from neo_components.storage.deferred import unfilled
from neo_components.storage.hub import resolve
from neo_components.storage.weights import (
    TensorFiles,
    as_dtype,
    load_strict,
    read_config,
    save_description,
    save_folder,
    settle,
)
from neo_components.types import IGNORED, NO_IMAGE, Batch, InputSpec, Output, Sample

TEXT = ("shared", "bypass")
"""Where text goes: through the pre-Buffer like the images (NEO), or around it."""


class NEO(Component):
    """The whole model.

    Args:
        patch_embedding: pixels to visual tokens.
        pre_buffer: primitives that visual and text tokens pass first; it takes the patch embedding as its part.
        post_llm: the widened language model.
        bridge_in: maps the language model's word embeddings to the pre-Buffer's width; ``None`` if they are the same.
        bridge_out: maps the pre-Buffer's output to the language model's width.
        text: ``shared``, words and images pass the pre-Buffer together (NEO paper), or ``bypass``: each image passes it
            alone with its two boundary tokens, and words reach the language model untouched.

    Attributes:
        every_part: whether all parts compute in every batch, also where a batch without an image has no use for some.
            Processes that divide the weights need it: whoever gathers a part, gathers it together with all others.

    Raises:
        ValueError: if the widths do not meet, the parts' types differ, pre-Buffer and post-LLM count positions by
            different rules, or ``text`` is unknown.
    """

    every_part: bool = False

    def __init__(
        self,
        patch_embedding: PatchEmbedding,
        pre_buffer: PreBuffer,
        post_llm: PostLLM,
        bridge_in: Bridge | None = None,
        bridge_out: Bridge | None = None,
        text: str = "shared",
    ) -> None:
        super().__init__()
        if text not in TEXT:
            raise ValueError(f"text must be one of {', '.join(TEXT)}, got {text!r}")
        self.text = text
        pre_buffer.adopt(patch_embedding)
        self.pre_buffer = pre_buffer
        self.post_llm = post_llm
        self.bridge_in = bridge_in
        self.bridge_out = bridge_out
        self._check()

    def _check(self) -> None:
        inner, outer = self.pre_buffer.hparams.hidden_size, self.post_llm.hparams.hidden_size
        seams = [("bridge_in", self.bridge_in, outer, inner), ("bridge_out", self.bridge_out, inner, outer)]
        if self.text == "bypass":
            if self.bridge_in is not None:
                raise ValueError("text='bypass' leads no word into the pre-Buffer, so bridge_in must be None")
            seams = seams[1:]
        for name, bridge, come, go in seams:
            widths = (bridge.hparams.in_width, bridge.hparams.out_width) if bridge is not None else (come, come)
            if widths != (come, go):
                raise ValueError(
                    f"{name} must map width {come} to {go} (pre-Buffer {inner}, post-LLM {outer}), "
                    f"got {'none' if bridge is None else f'{widths[0]} to {widths[1]}'}; attach(...) builds bridges"
                )
        parts: dict[str, nn.Module | None] = {"pre_buffer": self.pre_buffer, "post_llm": self.post_llm}
        parts |= {"bridge_in": self.bridge_in, "bridge_out": self.bridge_out}
        types = {name: next(part.parameters()).dtype for name, part in parts.items() if part is not None}
        if len(set(types.values())) > 1:
            raise ValueError(f"the parts must have one type, got {types}; load them with one dtype, or .to(...) it")
        if self.pre_buffer.rotary.index_rule is not self.post_llm.rotary.index_rule:
            raise ValueError(
                f"pre-Buffer and post-LLM count positions by different rules: rope {self.pre_buffer.hparams.rope!r} "
                f"and {self.post_llm.hparams.rope!r}; build both with the same rope"
            )

    @property
    def patch_embedding(self) -> PatchEmbedding:
        """The patch embedding layer."""
        assert self.pre_buffer.patch_embedding is not None
        return self.pre_buffer.patch_embedding

    @property
    def input_spec(self) -> InputSpec:
        """What ``pack`` has to know about this model."""
        patch, llm = self.patch_embedding.hparams, self.post_llm.hparams
        return InputSpec(
            image_token_id=llm.image_token_id,
            image_start_id=llm.image_start_id,
            image_end_id=llm.image_end_id,
            vocab_size=llm.vocab_size,
            patch_size=patch.patch_size,
            fold=patch.fold,
            channels=patch.channels,
            index_rule=self.post_llm.rotary.index_rule,
        )

    @property
    def layer_rules(self) -> list[LayerRule]:
        """Whom the tokens of every block see, pre-Buffer first: mask rule and window."""
        return [*self.pre_buffer.layer_rules, *self.post_llm.layer_rules]

    def length_buckets(self, length: int) -> tuple[int, ...]:
        """Which rotary frequencies a document of ``length`` T positions gets; constant in most models."""
        return (*self.pre_buffer.length_buckets(length), *self.post_llm.length_buckets(length))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups of parameters, by module; a stage names those that it trains.

        ``pre_buffer`` includes the boundary vectors but not the patch embedding; ``post_llm`` is the whole language
        model, of which ``post_llm.hw`` (new H/W parts), ``post_llm.word_embedding`` and ``post_llm.head`` are parts.
        """
        pre, post = self.pre_buffer, self.post_llm
        groups: dict[str, list[nn.Parameter]] = {
            "patch_embedding": list(self.patch_embedding.parameters()),
            "pre_buffer": [pre.boundary, *pre.layers.parameters()],
            "post_llm": list(post.parameters()),
            "post_llm.hw": [p for part in post.hw_modules() for p in part.parameters()],
            "post_llm.word_embedding": list(post.word_embedding.parameters()),
            "post_llm.head": list((post.lm_head or post.word_embedding).parameters()),
        }
        bridges = [bridge for bridge in (self.bridge_in, self.bridge_out) if bridge is not None]
        if bridges:
            groups["bridge"] = [p for bridge in bridges for p in bridge.parameters()]
        return groups

    def embed(self, batch: Batch) -> Tensor:
        """[B, L, D of the pre-Buffer]: word embeddings, boundary vectors and visual tokens at their places."""
        x = self.post_llm.embed(batch.token_ids)
        if self.bridge_in is not None:
            x = self.bridge_in(x)
        return self._place_images(x, batch.token_ids, batch.image_ids, batch)

    def _place_images(self, x: Tensor, token_ids: Tensor, image_ids: Tensor, batch: Batch) -> Tensor:
        """x [B, L, D of the pre-Buffer] with boundary vectors and visual tokens where the ids say so."""
        llm = self.post_llm.hparams
        for vector, token_id in zip(self.pre_buffer.boundary, (llm.image_start_id, llm.image_end_id), strict=True):
            x = torch.where((token_ids == token_id)[..., None], vector.to(x.dtype), x)
        visual = (image_ids != NO_IMAGE).flatten().nonzero()[:, 0]
        if len(visual):
            tokens = self.patch_embedding(batch.patches, batch.patch_positions).to(x.dtype)
            return x.flatten(0, 1).index_copy(0, visual, tokens).view_as(x)
        if self.every_part:
            return x + self._no_image(batch).sum().to(x.dtype) * 0.0
        return _untouched(x, self.patch_embedding) if self.training else x

    def _no_image(self, batch: Batch) -> Tensor:
        """[1, D of the pre-Buffer]: what the patch embedding makes of one empty visual token."""
        patch = self.patch_embedding.hparams
        patches = batch.patches.new_zeros(patch.fold**2, patch.channels * patch.patch_size**2)
        return self.patch_embedding(patches, batch.patch_positions.new_zeros(patch.fold**2, 2))

    def _images_alone(self, batch: Batch, hidden_states: dict[str, Tensor] | None) -> Tensor:
        """[B, L, D of the post-LLM]: words as the language model embeds them, and images as the pre-Buffer sees each
        one alone, between its boundary vectors."""
        words = self.post_llm.embed(batch.token_ids)
        own = self._own_images(batch)
        places = (own >= 0).flatten().nonzero()[:, 0]
        if nothing := not len(places):
            if not self.every_part:
                parts = [part for part in (self.pre_buffer, self.bridge_out) if part is not None]
                return _untouched(words, *parts) if self.training else words
            places = places.new_zeros(1)  # any one token takes the way of the images, and nothing comes of it
        ids, image_ids, own, positions = (
            column.flatten(0, 1)[places][None] for column in (batch.token_ids, batch.image_ids, own, batch.positions)
        )
        own = own.zero_() if nothing else own  # that of padding would see nothing, not even itself
        image_ids = torch.where(image_ids == NO_IMAGE, image_ids, own)
        x = words.new_zeros(*ids.shape, self.pre_buffer.hparams.hidden_size)
        x = self._place_images(x, ids, image_ids, batch)
        x = self.pre_buffer.run(x, positions, own, image_ids, hidden_states=hidden_states)
        x = x if self.bridge_out is None else self.bridge_out(x)
        if nothing:
            return words + x.sum().to(words.dtype) * 0.0
        return words.flatten(0, 1).index_copy(0, places, x[0].to(words.dtype)).view_as(words)

    def _own_images(self, batch: Batch) -> Tensor:
        """[B, L]: a number for the image that a visual or boundary token belongs to, other in every row; ``-1`` for
        words. A boundary token without an image has a number of its own."""
        llm, length = self.post_llm.hparams, batch.token_ids.shape[1]
        none = batch.image_ids.new_full((len(batch.image_ids), 1), NO_IMAGE)
        starts, ends = batch.token_ids == llm.image_start_id, batch.token_ids == llm.image_end_id
        own = torch.where(starts, torch.cat([batch.image_ids[:, 1:], none], dim=1), batch.image_ids)
        own = torch.where(ends, torch.cat([none, batch.image_ids[:, :-1]], dim=1), own)
        place = torch.arange(length, device=own.device).expand_as(own)
        own = torch.where((starts | ends) & (own == NO_IMAGE), length + place, own)
        row = torch.arange(len(own), device=own.device)[:, None]
        return torch.where(own == NO_IMAGE, own, own + 2 * length * row)

    def hidden(
        self,
        batch: Batch,
        attend: Attend | Sequence[Attend] | None = None,
        hidden_states: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The final norm's output.

        Args:
            batch: packed rows.
            attend: attention for all blocks, prepared by the caller: one backend or one per block (a cache). Under
                ``text="bypass"`` only the post-LLM's are used: the pre-Buffer sees each image alone.
            hidden_states: filled with ``embed``, ``layer_<i>`` and ``final_norm``. Under ``text="bypass"`` the
                pre-Buffer's layers hold [1, tokens of images, D], and ``embed`` is what enters the post-LLM.

        Returns:
            [B, L, D of the post-LLM].
        """
        pre, post = self.pre_buffer, self.post_llm
        depth = len(pre.layers)
        if attend is None:
            prepared: Prepared = {}
            attend = [
                *pre.prepare(batch.document_ids, batch.image_ids, prepared),
                *post.prepare(batch.document_ids, batch.image_ids, prepared),
            ]
        first, then = (attend[:depth], attend[depth:]) if isinstance(attend, Sequence) else (attend, attend)
        where = (batch.positions, batch.document_ids, batch.image_ids)
        x = self._images_alone(batch, hidden_states) if self.text == "bypass" else self.embed(batch)
        if hidden_states is not None:
            hidden_states["embed"] = x
        if self.text == "shared":
            x = pre.run(x, *where, first, hidden_states)
            x = x if self.bridge_out is None else self.bridge_out(x)
        x = post(x, *where, then, hidden_states, depth)
        if hidden_states is not None:
            hidden_states["final_norm"] = x
        return x

    def forward(self, batch: Batch, output_hidden_states: bool = False) -> Output:
        """Logits of every token, and the loss if there are labels.

        Args:
            batch: packed rows.
            output_hidden_states: also return what each step produced.

        Returns:
            ``Output``: logits [B, L, V], loss scalar or ``None``.
        """
        states: dict[str, Tensor] | None = {} if output_hidden_states else None
        hidden = self.hidden(batch, hidden_states=states)
        labelled = bool((batch.labels != IGNORED).any())
        return Output(self.post_llm.logits(hidden), self._loss(hidden, batch) if labelled else None, states)

    def loss(self, batch: Batch, nll: list[Tensor] | None = None) -> Tensor:
        """The training path: ``sum(w * nll) / max(sum(w), 1e-5)``, logits formed at labelled tokens only, in chunks.

        Args:
            batch: packed rows; 0 is returned (with gradients of 0) if nothing is labelled.
            nll: filled with one tensor, [n] float32 without gradient: the negative log likelihood of each of the n
                learnt tokens, row by row.

        Returns:
            Scalar float32.
        """
        return self._loss(self.hidden(batch), batch, nll)

    def _loss(self, hidden: Tensor, batch: Batch, nll: list[Tensor] | None = None) -> Tensor:
        target, weight = batch.labels[:, 1:], batch.loss_weights[:, 1:]
        learnt = target != IGNORED
        state, target, weight = hidden[:, :-1][learnt], target[learnt], weight[learnt]
        total, each = token_loss(state, self.post_llm.head_weight, target, weight, self.post_llm.hparams.logits_divisor)
        if nll is not None:
            nll.append(each)
        return total / weight.sum().clamp(min=1e-5)

    @torch.no_grad()
    def generate(
        self,
        samples: Sequence[Sample],
        max_new_tokens: int = 16,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop_token_ids: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Continues prompts; arguments as in :func:`neo_components.model.generation.generate`.

        Args:
            samples: prompts, without labels.

        Returns:
            One [new] int64 tensor per sample, the stop token included.
        """
        prompts = pack(samples, self.input_spec).to(self.post_llm.word_embedding.weight.device)
        training = self.training
        self.eval()
        try:
            return generate(self, prompts, max_new_tokens, do_sample, temperature, top_p, stop_token_ids, generator)
        finally:
            self.train(training)

    @torch.no_grad()
    def attention_maps(self, batch: Batch) -> list[Tensor]:
        """Attention weights of every block, pre-Buffer first: [B, N, L, L] each. Under ``text="bypass"`` those of the
        post-LLM alone: no row of the batch passes the pre-Buffer as a whole."""
        attend = [EagerAttention(batch.document_ids, batch.image_ids, *rule) for rule in self.layer_rules]
        self.hidden(batch, attend)
        return [backend.weights[0] for backend in attend if backend.weights]

    def save_pretrained(self, folder: str | Path, layout: str = "neo_components") -> Path:
        """Writes the model.

        Args:
            folder: made if absent.
            layout: ``neo_components``, or ``released`` (the layout of the published NEO weights; there the vectors of
                ``<img>`` and ``</img>`` are rows of the word embedding, so with tied embeddings these two tokens'
                logits follow them).

        Raises:
            ValueError: if the layout is unknown or cannot hold this model.
        """
        if layout == "released":
            return save_released(self, folder)
        if layout != "neo_components":
            raise ValueError(f"layout must be 'neo_components' or 'released', got {layout!r}")
        return save_folder(folder, self.state_dict(), own_config(self), self._card())

    def save_description(self, folder: str | Path) -> None:
        """Writes config.json and the model card of the own layout, for a caller that writes the weights itself."""
        save_description(Path(folder), own_config(self), self._card())

    def _card(self) -> str:
        pre, llm = self.pre_buffer.hparams, self.post_llm.hparams
        return (
            "---\nlibrary_name: neo-components\npipeline_tag: image-text-to-text\n---\n"
            "# Native vision-language model\n\n"
            f"A pre-Buffer of {pre.depth} and a post-LLM of {llm.depth} native primitives (NEO, arXiv 2510.14979), "
            f"{sum(p.numel() for p in self.parameters()):,} parameters.\n\n"
            "```python\nfrom neo_components import NEO\n\n"
            'model = NEO.from_pretrained("THIS_FOLDER")\n```\n'
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype | str = "float32") -> NEO:
        """Reads a model in our own or the released layout, told apart by config.json. No random numbers are drawn.

        Args:
            source: folder or hub id.
            dtype: of the weights in memory, whatever the files hold: float32, bfloat16 or float16.

        Raises:
            FileNotFoundError: if there is no checkpoint, or only a pickled one.
            ValueError: if it is no NEO model, or a tensor is missing, unexpected or misshapen.
        """
        dtype = as_dtype(dtype)
        folder = resolve(source)
        config = read_config(folder)
        released = layout_of(config, folder) == "released"
        with unfilled():
            model = cls(**(parts_from_released if released else parts_from_own)(config, folder))
        if released:
            load_released(model, folder, dtype)
        else:
            load_strict(model, TensorFiles(folder), dtype=dtype)
            settle(model, dtype)
        return model


def _untouched(x: Tensor, *parts: nn.Module) -> Tensor:
    """x, with gradients of zero for parts that nothing passed in this batch: every rank must have them all."""
    weights = [p.sum() for part in parts for p in part.parameters()]
    return x + torch.stack(weights).sum().to(x.dtype) * 0.0
