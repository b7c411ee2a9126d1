"""An exported model as transformers loads it: ``NEO`` behind the interface of an image-text-to-text model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from neo_components.components.bridge import bridge_from
from neo_components.components.image_embedding import embedding_from
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.rotary import Rotary
from neo_components.data.packing import patch_grid
from neo_components.export.hf.caching import cached_attention
from neo_components.export.hf.configuration_neo import NEOConfig
from neo_components.export.hf.rows import Rows
from neo_components.model.neo import NEO
from neo_components.types import IGNORED, Batch

BACKENDS = {"sdpa": "sdpa", "eager": "eager", "flex_attention": "flex"}
"""``attn_implementation`` of transformers -> the attention backend for prompts."""


class NEOPreTrainedModel(PreTrainedModel):
    """What transformers wants to know before it builds the model."""

    config: NEOConfig
    config_class = NEOConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]  # noqa: RUF012 - a class attribute of transformers
    _supports_sdpa = True
    _supports_flex_attn = True
    _no_split_modules = ["NEO"]  # noqa: RUF012 - its parts call each other, so it stays on one device

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights start where the components start them; tables are no weights and must be filled after loading."""
        if isinstance(module, Rotary):
            module.fill_tables()


class NEOForConditionalGeneration(NEOPreTrainedModel, GenerationMixin):
    """A native vision-language model.

    Inputs come from the folder's processor. Rows may be padded on either side; for ``generate`` pad on the left.
    """

    def __init__(self, config: NEOConfig) -> None:
        super().__init__(config)
        self.model = NEO(
            embedding_from(config.patch_embedding or {}),
            PreBuffer(**(config.pre_buffer or {})),
            PostLLM(**(config.post_llm or {})),
            bridge_from(config.bridge_in),
            bridge_from(config.bridge_out),
        )
        self.by_length = any(isinstance(part, Rotary) and part.looks_at_length for part in self.modules())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embedding."""
        return self.model.post_llm.word_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embedding."""
        self.model.post_llm.word_embedding = value

    def get_output_embeddings(self) -> nn.Module | None:
        """The head; ``None`` where it is the word embedding."""
        return self.model.post_llm.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the head."""
        self.model.post_llm.lm_head = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_hw: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss if there are labels.

        Args:
            input_ids: [B, L] int64; an image is a run of ``config.image_token_id``.
            attention_mask: [B, S] 0 for padding, S being L and what the cache holds.
            pixel_values: [P, C * patch_size**2] patches of all images of ``input_ids``, row by row.
            image_grid_hw: [I, 2] rows and columns of patches of each image.
            past_key_values: a cache of transformers.
            labels: [B, L] unshifted, ``-100`` ignored.
            use_cache: return a cache; by default unless in training.
            logits_to_keep: give logits of only the last so many tokens; 0 of all.
            output_hidden_states: also return what went into each block, and the final norm's output as the last.
            output_attentions: not available.
            kwargs: of transformers' loss.

        Raises:
            ValueError: if images, mask and tokens do not fit each other.
        """
        if output_attentions:
            raise ValueError("attention weights are not returned; NEO.attention_maps of neo-components gives them")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        rows = self._rows(input_ids, attention_mask, image_grid_hw, past_key_values)
        length = input_ids.shape[1]
        backend = BACKENDS[self.config._attn_implementation or "sdpa"]
        attend = cached_attention(rows, length, self.model.layer_rules, past_key_values, backend)
        states: dict[str, Tensor] | None = {} if output_hidden_states else None
        hidden = self.model.hidden(self._batch(input_ids, rows, pixel_values, image_grid_hw), attend, states)
        if past_key_values is not None:
            past_key_values.neo_rows = rows
        logits = self.model.post_llm.logits(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else self._states(states),  # type: ignore[arg-type]
        )

    def _states(self, states: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """In transformers' order: what went into each block, and the final norm's output."""
        blocks = [states[f"layer_{number}"] for number in range(self.config.num_hidden_layers - 1)]
        return (states["embed"], *blocks, states["final_norm"])

    def _rows(self, input_ids: Tensor, attention_mask: Tensor | None, image_grid_hw: Tensor | None, cache: Any) -> Rows:
        """What is known of all tokens, those in the cache included."""
        spec, past = self.model.input_spec, 0 if cache is None else cache.get_seq_length()
        known = getattr(cache, "neo_rows", None) if past else Rows.none(spec, len(input_ids))
        if known is None:
            raise ValueError("past_key_values holds tokens that this model did not read; start with an empty cache")
        known = known.cut(past)
        rows = known.extend(input_ids, attention_mask, self._sizes(image_grid_hw))
        if past and self._frequencies_change(known, rows):
            raise ValueError(
                "the new tokens make a row so long that its frequencies change, which voids what the cache holds "
                "(longrope and dynamic scaling); read all tokens again without past_key_values, as generate does"
            )
        return rows

    def _sizes(self, image_grid_hw: Tensor | None) -> list[tuple[int, int]]:
        """Rows and columns of visual tokens of each image."""
        fold = self.model.input_spec.fold
        grids = [] if image_grid_hw is None else image_grid_hw.tolist()
        return [(rows // fold, columns // fold) for rows, columns in grids]

    def _frequencies_change(self, before: Rows, after: Rows) -> bool:
        """Whether rows are rotated by other frequencies than their cached keys."""
        if not self.by_length:
            return False
        lengths = zip(before.lengths(), after.lengths(), strict=True)
        return any(
            self.model.length_buckets(short) != self.model.length_buckets(long) for short, long in lengths if short
        )

    def _batch(self, input_ids: Tensor, rows: Rows, pixel_values: Tensor | None, image_grid_hw: Tensor | None) -> Batch:
        """The new tokens as the model's own input."""
        length, device, spec = input_ids.shape[1], input_ids.device, self.model.input_spec
        patch_positions = patch_grid([] if image_grid_hw is None else image_grid_hw.tolist(), spec.fold).to(device)
        if pixel_values is None:
            pixel_values = torch.zeros(0, spec.channels * spec.patch_size**2, device=device)
        if len(patch_positions) != len(pixel_values):
            raise ValueError(
                f"image_grid_hw counts {len(patch_positions)} patches, pixel_values holds {len(pixel_values)}; "
                "both come from the processor"
            )
        return Batch(
            token_ids=input_ids,
            positions=rows.positions(length),
            document_ids=rows.document_ids[:, -length:],
            image_ids=rows.image_ids[:, -length:],
            token_kinds=rows.token_kinds[:, -length:],
            labels=torch.full_like(input_ids, IGNORED),
            loss_weights=torch.zeros(input_ids.shape, device=device),
            patches=pixel_values,
            patch_positions=patch_positions,
            image_grids=torch.zeros(0, 2, dtype=torch.int64, device=device) if image_grid_hw is None else image_grid_hw,
        )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: Any = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> Any:
        """Images go with the prompt only, unless it is read again: without a cache, or where the cache is void."""
        if past_key_values is not None and past_key_values.is_compileable:
            raise ValueError("caches of a fixed length are not supported; leave cache_implementation out")
        if past_key_values is not None and not is_first_iteration and self._is_void(input_ids, past_key_values, kwargs):
            past_key_values, is_first_iteration = DynamicCache(config=self.config), True
            kwargs["next_sequence_length"] = None
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs |= {"pixel_values": None, "image_grid_hw": None}
        parent: Any = super()
        return parent.prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, is_first_iteration=is_first_iteration, **kwargs
        )

    def _is_void(self, input_ids: Tensor, cache: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the tokens behind those in the cache change the frequencies that it was filled with."""
        known, past = getattr(cache, "neo_rows", None), cache.get_seq_length()
        if known is None or not 0 < past < input_ids.shape[1]:
            return False
        known = known.cut(past)
        return self._frequencies_change(known, known.extend(input_ids[:, past:], kwargs.get("attention_mask"), []))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Repeats each row, for beams and several answers: all patches of an image together."""
        again: dict[str, list[Tensor]] = {}
        if expand_size > 1 and input_ids is not None and kwargs.get("pixel_values") is not None:
            grids, pixels = kwargs.pop("image_grid_hw"), kwargs.pop("pixel_values")
            none = Rows.none(self.model.input_spec, len(input_ids))
            rows = none.extend(input_ids, kwargs.get("attention_mask"), self._sizes(grids))
            counts = [len(own) for own in rows.grids]
            patches = [int(part.prod(-1).sum()) for part in grids.split(counts)]
            again["image_grid_hw"] = [part for part in grids.split(counts) for _ in range(expand_size)]
            again["pixel_values"] = [part for part in pixels.split(patches) for _ in range(expand_size)]
        parent: Any = super()
        input_ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | {name: torch.cat(parts) for name, parts in again.items()}
