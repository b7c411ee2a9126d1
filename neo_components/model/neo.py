"""NEO: patch embedding, pre-Buffer and post-LLM joined into a native vision-language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from neo_components.components.backends import EagerAttention
from neo_components.components.block_inputs import Attend
from neo_components.components.bridge import Bridge
from neo_components.components.image_embedding import ImageEmbedding
from neo_components.components.masks import LayerRule
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.stack import Prepared
from neo_components.components.text_route import Passing, TextRoute
from neo_components.components.token_loss import token_loss
from neo_components.data.packing import pack
from neo_components.model.generation import generate
from neo_components.model.neo_files import NEOFiles
from neo_components.token_indices import TokenIndices
from neo_components.types import Batch, InputSpec, Output, Sample


class NEO(NEOFiles):
    """The full model.

    Args:
        patch_embedding: pixels to tokens.
        pre_buffer: primitives that visual and text tokens pass first; it takes the patch embedding as its part.
        post_llm: the widened language model.
        bridge_in: maps the language model's word embeddings to the pre-Buffer's width; ``None`` if they are the same.
        bridge_out: maps the pre-Buffer's output to the language model's width.
        text: ``shared``, words and images pass the pre-Buffer together (NEO paper), or ``bypass``: each image passes it
            alone with its two boundary tokens, and words reach the language model untouched.

    Attributes:
        route: path of text tokens, :class:`~neo_components.components.text_route.TextRoute`.
        every_part: whether all parts compute in every batch, also those that a batch without an image does not need.
            Sharded training needs it: all processes must gather a part together.

    Raises:
        ValueError: if the widths do not meet, the parts' types differ, pre-Buffer and post-LLM count positions by
            different rules, or ``text`` is unknown.
    """

    every_part: bool = False

    def __init__(
        self,
        patch_embedding: ImageEmbedding,
        pre_buffer: PreBuffer,
        post_llm: PostLLM,
        bridge_in: Bridge | None = None,
        bridge_out: Bridge | None = None,
        text: str = "shared",
    ) -> None:
        super().__init__()
        self.route = TextRoute(text)
        pre_buffer.adopt(patch_embedding)
        self.pre_buffer = pre_buffer
        self.post_llm = post_llm
        self.bridge_in = bridge_in
        self.bridge_out = bridge_out
        self._check_widths()
        self._check_types()
        if pre_buffer.hparams.rope != post_llm.hparams.rope:
            raise ValueError(
                f"pre-Buffer and post-LLM count positions by different rules: rope {pre_buffer.hparams.rope!r} "
                f"and {post_llm.hparams.rope!r}; build both with the same rope"
            )

    def _check_widths(self) -> None:
        inner, outer = self.pre_buffer.hparams.hidden_size, self.post_llm.hparams.hidden_size
        seams = [("bridge_in", self.bridge_in, outer, inner), ("bridge_out", self.bridge_out, inner, outer)]
        if not self.route.words_pass:
            if self.bridge_in is not None:
                raise ValueError(f"text={self.text!r} leads no text into the pre-Buffer, so bridge_in must be None")
            seams = seams[1:]
        for name, bridge, before, behind in seams:
            widths = (bridge.hparams.in_width, bridge.hparams.out_width) if bridge is not None else (before, before)
            if widths != (before, behind):
                raise ValueError(
                    f"{name} must map width {before} to {behind} (pre-Buffer {inner}, post-LLM {outer}), "
                    f"got {'none' if bridge is None else f'{widths[0]} to {widths[1]}'}; attach(...) builds bridges"
                )

    def _check_types(self) -> None:
        parts: dict[str, nn.Module | None] = {"pre_buffer": self.pre_buffer, "post_llm": self.post_llm}
        parts |= {"bridge_in": self.bridge_in, "bridge_out": self.bridge_out}
        types = {name: p.dtype for name, part in parts.items() if part is not None for p in [*part.parameters()][:1]}
        if len(set(types.values())) > 1:
            raise ValueError(f"the parts must have one type, got {types}; load them with one dtype, or .to(...) it")

    def lead_text(self, text: str) -> None:
        """Leads text tokens another way than before; ``bypass`` drops the bridge into the pre-Buffer.

        Args:
            text: ``shared`` or ``bypass``.

        Raises:
            ValueError: if it is unknown, or text needs a bridge into the pre-Buffer that this model does not have.
        """
        route = TextRoute(text)
        if route.words_pass and self.bridge_in is None and self.bridge_out is not None:
            raise ValueError(
                f"text={text!r} is not possible: this model has no bridge into its pre-Buffer; attach that to the "
                "language model again, with that route"
            )
        self.route = route
        if not route.words_pass:
            self.bridge_in = None

    @property
    def input_spec(self) -> InputSpec:
        """The properties of this model that ``pack`` needs."""
        embedding, llm = self.patch_embedding, self.post_llm.hparams
        return InputSpec(
            image_token_id=llm.image_token_id,
            image_start_id=llm.image_start_id,
            image_end_id=llm.image_end_id,
            vocab_size=llm.vocab_size,
            patch_size=embedding.patch_size,
            fold=embedding.fold,
            channels=embedding.channels,
            index_rule=self.post_llm.rotary.variant.positions,
            image_layout=embedding.image_layout,
        )

    @property
    def layer_rules(self) -> list[LayerRule]:
        """Mask rule and window of every block, pre-Buffer first."""
        return [*self.pre_buffer.layer_rules, *self.post_llm.layer_rules]

    def length_buckets(self, length: int) -> tuple[int, ...]:
        """Rope length buckets of a document of ``length`` T positions; constant in most models."""
        return (*self.pre_buffer.length_buckets(length), *self.post_llm.length_buckets(length))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Named groups of parameters, by module; a stage names those that it trains.

        ``pre_buffer`` includes the boundary vectors but not the patch embedding; ``post_llm`` is the full language
        model, of which ``post_llm.hw`` (new H/W parts), ``post_llm.blocks`` (blocks with these, and the final norm),
        ``post_llm.word_embedding`` and ``post_llm.head`` are parts.
        ``visual_experts`` is what expert routing added to the blocks of both.
        """
        pre, post = self.pre_buffer, self.post_llm
        experts = [*pre.expert_modules(), *post.expert_modules()]
        bridges = [bridge for bridge in (self.bridge_in, self.bridge_out) if bridge is not None]
        groups: dict[str, list[nn.Parameter]] = {
            "patch_embedding": list(self.patch_embedding.parameters()),
            "pre_buffer": [pre.boundary, *pre.layers.parameters()],
            "post_llm": list(post.parameters()),
            "post_llm.hw": [p for part in post.hw_modules() for p in part.parameters()],
            "post_llm.blocks": [*post.layers.parameters(), *post.norm.parameters()],
            "post_llm.word_embedding": list(post.word_embedding.parameters()),
            "post_llm.head": list((post.lm_head or post.word_embedding).parameters()),
            "visual_experts": [p for part in experts for p in part.parameters()],
            "bridge": [p for bridge in bridges for p in bridge.parameters()],
        }
        absent = {name for name, modules in (("visual_experts", experts), ("bridge", bridges)) if not modules}
        return {name: parameters for name, parameters in groups.items() if name not in absent}

    def embed(self, batch: Batch) -> Tensor:
        """[B, L, D of the pre-Buffer]: word embeddings, boundary vectors and the tokens of images where they belong."""
        x = self.post_llm.embed(batch.token_ids)
        if self.bridge_in is not None:
            x = self.bridge_in(x)
        return self._with_images(x, batch.token_ids, None, batch)

    def _with_images(self, x: Tensor, token_ids: Tensor, known: TokenIndices | None, batch: Batch) -> Tensor:
        """x [B, L, D of the pre-Buffer] with boundary vectors and tokens of images at their ids; ``known``: where
        these are, ``None``: as in the batch."""
        llm = self.post_llm.hparams
        for vector, token_id in zip(self.pre_buffer.boundary, (llm.image_start_id, llm.image_end_id), strict=True):
            x = torch.where((token_ids == token_id)[..., None], vector.to(x.dtype), x)
        if len(batch.patches):
            grids = batch.indices.ids["image_grids"]
            tokens = self.patch_embedding(batch.patches, batch.patch_positions, grids).to(x.dtype)
            index = (known or batch.indices).visual.exact
            return x.flatten(0, 1).index_copy(0, index, tokens).view_as(x)
        if self.every_part:
            return x + self._no_image(batch).sum().to(x.dtype) * 0.0
        return _untouched(x, self.patch_embedding) if self.training else x

    def _no_image(self, batch: Batch) -> Tensor:
        """[tokens, D of the pre-Buffer]: what the patch embedding makes of one empty visual token."""
        embedding = self.patch_embedding
        side = embedding.fold
        patches = batch.patches.new_zeros(side**2, embedding.channels * embedding.patch_size**2)
        positions = batch.patch_positions.new_zeros(side**2, 2)
        return embedding(patches, positions, torch.full((1, 2), side, device="cpu"))

    def _before_llm(
        self, batch: Batch, attend: Attend | Sequence[Attend] | None, hidden_states: dict[str, Tensor] | None
    ) -> Tensor:
        """[B, L, D of the post-LLM]: what the language model reads."""
        if self.route.words_pass:
            x = self.embed(batch)
            if hidden_states is not None:
                hidden_states["embed"] = x
            return self._through_pre_buffer(x, self.route.passing(batch), attend, hidden_states)
        words = self.post_llm.embed(batch.token_ids)
        x = self._images_into(words, batch, hidden_states)
        if hidden_states is not None:
            hidden_states["embed"] = x
        return x

    def _images_into(self, words: Tensor, batch: Batch, hidden_states: dict[str, Tensor] | None) -> Tensor:
        """words [B, L, D of the post-LLM] with what the pre-Buffer makes of each image alone."""
        passing = self.route.passing(batch)
        if nothing := not len(passing.document_ids[0]):
            if not self.every_part:
                parts = [part for part in (self.pre_buffer, self.bridge_out) if part is not None]
                return _untouched(words, *parts) if self.training else words
            passing = self.route.one_token(batch)
        x = words.new_zeros(*passing.token_ids.shape, self.pre_buffer.hparams.hidden_size)
        x = self._with_images(x, passing.token_ids, passing.known, batch)
        x = self._through_pre_buffer(x, passing, None, hidden_states)
        if nothing:
            return words + x.sum().to(words.dtype) * 0.0
        assert passing.index is not None
        tokens = x[0, : len(passing.index)].to(words.dtype)
        return words.flatten(0, 1).index_copy(0, passing.index, tokens).view_as(words)

    def _through_pre_buffer(
        self,
        x: Tensor,
        passing: Passing,
        attend: Attend | Sequence[Attend] | None,
        hidden_states: dict[str, Tensor] | None,
    ) -> Tensor:
        """Pre-Buffer and bridge over the tokens that pass them."""
        x = self.pre_buffer(
            x, passing.positions, passing.document_ids, passing.image_ids, passing.token_kinds, attend=attend,
            hidden_states=hidden_states, known=passing.known,
        )  # fmt: skip
        return x if self.bridge_out is None else self.bridge_out(x)

    def hidden(
        self,
        batch: Batch,
        attend: Attend | Sequence[Attend] | None = None,
        hidden_states: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The final norm's output.

        Args:
            batch: packed sequences.
            attend: attention for all blocks, prepared by the caller: one backend or one per block (a cache). Under
                ``text="bypass"`` only the post-LLM's are used: the pre-Buffer reads each image alone.
            hidden_states: filled with ``embed``, ``layer_<i>`` and ``final_norm``. Under ``text="bypass"`` the
                pre-Buffer's layers hold [1, tokens of images, D], and ``embed`` is what enters the post-LLM.

        Returns:
            [B, L, D of the post-LLM].
        """
        depth = len(self.pre_buffer.layers)
        if attend is None:
            attend = self._prepare(batch)
        first, then = (attend[:depth], attend[depth:]) if isinstance(attend, Sequence) else (attend, attend)
        x = self._before_llm(batch, first, hidden_states)
        x = self.post_llm(
            x, batch.positions, batch.document_ids, batch.image_ids, batch.token_kinds, attend=then,
            hidden_states=hidden_states, first=depth, known=batch.known,
        )  # fmt: skip
        if hidden_states is not None:
            hidden_states["final_norm"] = x
        return x

    def _prepare(self, batch: Batch) -> list[Attend]:
        """The attention backend of every block; pre-Buffer and post-LLM share those that are alike."""
        prepared: Prepared = {}
        where = (batch.document_ids, batch.image_ids, prepared, batch.token_kinds, batch.known)
        return [*self.pre_buffer.prepare(*where), *self.post_llm.prepare(*where)]

    def forward(self, batch: Batch, output_hidden_states: bool = False) -> Output:
        """Logits of every token, and the loss if there are labels.

        Args:
            batch: packed sequences.
            output_hidden_states: also return what each step produced.

        Returns:
            ``Output``: logits [B, L, V], loss scalar or ``None``.
        """
        states: dict[str, Tensor] | None = {} if output_hidden_states else None
        hidden = self.hidden(batch, hidden_states=states)
        labelled = batch.indices.targets.count > 0
        return Output(self.post_llm.logits(hidden), self._loss(hidden, batch) if labelled else None, states)

    def loss(self, batch: Batch, nll: list[Tensor] | None = None) -> Tensor:
        """The training path: ``sum(w * nll) / max(sum(w), 1e-5)``, logits formed at target tokens only, in chunks.

        Args:
            batch: packed sequences; 0 is returned (with gradients of 0) if nothing is labelled.
            nll: filled with one tensor, [n] float32 without gradient: the negative log likelihood of each of the n
                target tokens, sequence by sequence.

        Returns:
            Scalar float32.
        """
        return self._loss(self.hidden(batch), batch, nll)

    def _loss(self, hidden: Tensor, batch: Batch, nll: list[Tensor] | None = None) -> Tensor:
        targets, llm = batch.indices.targets, self.post_llm
        # Full chunks on a device: all have one shape, whatever the batch. What fills the last one weighs nothing.
        index = targets.exact if hidden.device.type == "cpu" else targets.filled
        state = hidden.flatten(0, 1).index_select(0, (index - 1).clamp(min=0))
        target, weight = (column.flatten().index_select(0, index) for column in (batch.labels, batch.loss_weights))
        weight[targets.count :] = 0.0
        total, each = token_loss(state, llm.head_weight, target.clamp(min=0), weight, llm.hparams.logits_divisor)
        if nll is not None:
            nll.append(each[: targets.count])
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
        compile: bool | None = None,
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
            return generate(
                self, prompts, max_new_tokens, do_sample, temperature, top_p, stop_token_ids, generator, compile
            )
        finally:
            self.train(training)

    @torch.no_grad()
    def attention_maps(self, batch: Batch) -> list[Tensor]:
        """Attention weights of every block, pre-Buffer first: [B, N, L, L] each. Under ``text="bypass"`` those of the
        post-LLM alone: no full sequence passes the pre-Buffer."""
        attend = [
            EagerAttention(batch.document_ids, batch.image_ids, *rule, token_kinds=batch.token_kinds)
            for rule in self.layer_rules
        ]
        self.hidden(batch, attend)
        return [backend.weights[0] for backend in attend if backend.weights]


def _untouched(x: Tensor, *parts: nn.Module) -> Tensor:
    """x, with gradients of zero for parts that nothing passed in this batch: every rank must have them all."""
    weights = [p.sum() for part in parts for p in part.parameters()]
    return x + torch.stack(weights).sum().to(x.dtype) * 0.0
