"""The post-LLM: a pretrained language model whose blocks have added H and W channels (NEO paper section 3.1).

The new keys start as zero, so the H/W score is exactly 0 and the model computes text as the language model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from neo_components.components.block_arguments import BlockArguments, flat_arguments
from neo_components.components.experts import start_from
from neo_components.components.layers import RMSNorm
from neo_components.components.post_llm_files import PostLLMFiles
from neo_components.components.primitive import NativePrimitive
from neo_components.components.stack import PrimitiveStack
from neo_components.errors import ArgumentError
from neo_components.types import NO_IMAGE, DocumentTokens, kinds_of


@flat_arguments
class PostLLM(PrimitiveStack, PostLLMFiles):
    """Word embedding, ``depth`` native primitives, final norm and head.

    Called as :meth:`PrimitiveStack.forward`: all blocks and the final norm.

    Args:
        vocab_size: V.
        depth: number of blocks.
        window_layers: numbers of the blocks that have the window; ``None``: all.
        window_base_t: base of the T frequencies in those blocks, unscaled; ``None``: like the others.
        nope_layers: numbers of the blocks without rotation of the T channels (NoPE); ``None``: none.
        expert_layers: numbers of the blocks that have experts; ``None``: all.
        expert_size: width of one expert; ``None``: ``feed_forward_size``.
        embedding_multiplier: factor of the word embeddings. Visual tokens are inserted after it.
        logits_divisor: what the head's output is divided by.
        tie_embeddings: the head is the word embedding.
        image_token_id: id of a visual token. A vocabulary without the three image tokens gets the next free ids: they
            need no row in the word embedding, as their vectors come from the pre-Buffer's side.
        image_start_id: id of ``<img>``.
        image_end_id: id of ``</img>``.
        source: where the weights come from; its tokenizer names the tokens when a bridge is fitted.
        backend: attention backend.
        init_std: standard deviation of the initial weights.

    Attributes:
        hf_config: config of the language model that it was read from, to write it back; ``None`` if it was built new.
    """

    def __init__(
        self,
        vocab_size: int,
        depth: int,
        *,
        window_layers: Sequence[int] | None = None,
        window_base_t: float | None = None,
        nope_layers: Sequence[int] | None = None,
        expert_layers: Sequence[int] | None = None,
        expert_size: int | None = None,
        embedding_multiplier: float = 1.0,
        logits_divisor: float = 1.0,
        tie_embeddings: bool = False,
        image_token_id: int | None = None,
        image_start_id: int | None = None,
        image_end_id: int | None = None,
        source: str = "",
        backend: str = "auto",
        init_std: float = 0.02,
        **block: Unpack[BlockArguments],
    ) -> None:
        super().__init__()
        image_token_id = vocab_size if image_token_id is None else image_token_id
        image_start_id = image_token_id + 1 if image_start_id is None else image_start_id
        image_end_id = image_start_id + 1 if image_end_id is None else image_end_id
        ids = {"image_token_id": image_token_id, "image_start_id": image_start_id, "image_end_id": image_end_id}
        self.build(self.given | ids)
        hidden_size = block["hidden_size"]
        self.word_embedding = nn.Embedding(vocab_size, hidden_size)
        self.norm = RMSNorm(hidden_size, block["norm_eps"], block["norm"])
        self.lm_head: nn.Linear | None = None
        if not tie_embeddings:
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Sets all weights of a new language model."""
        super().init_weights()
        nn.init.normal_(self.word_embedding.weight, 0.0, self.hparams.init_std)
        self.norm.reset_parameters()
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, 0.0, self.hparams.init_std)

    def build(self, arguments: Mapping[str, Any]) -> None:
        """As :meth:`PrimitiveStack.build`.

        Raises:
            ArgumentError: (a ``ValueError``) if a list names blocks that are not there, or an argument refines one that
                is not given.
        """
        h = arguments
        for name in ("window_layers", "nope_layers", "expert_layers"):
            if wrong := [number for number in h[name] or () if not 0 <= number < h["depth"]]:
                last = h["depth"] - 1
                raise ArgumentError(name, f"names block {wrong[0]}, but a depth of {h['depth']} has 0 to {last}")
        refined = {"window": ("window_layers", "window_base_t"), "num_experts": ("expert_layers", "expert_size")}
        for name, finer in refined.items():
            if lost := [finer_name for finer_name in finer if h[finer_name] is not None and h[name] is None]:
                raise ArgumentError(lost[0], f"has no effect without {name}, which is not given")
        super().build(arguments)
        self.embedding_multiplier, self.logits_divisor = h["embedding_multiplier"], h["logits_divisor"]

    def block_changes(self, number: int) -> dict[str, Any]:
        """Arguments in which block ``number`` differs from those for all blocks."""
        h = self.hparams
        changes: dict[str, Any] = {}
        if h.window is not None and h.window_layers is not None and number not in h.window_layers:
            changes["window"] = None
        elif h.window is not None and h.window_base_t is not None:
            changes |= {"base_t": h.window_base_t, "rope_scaling": None}
        if number in (h.nope_layers or ()):
            changes["rotary_width"] = 0
        if h.num_experts is not None and h.expert_layers is not None and number not in h.expert_layers:
            changes["num_experts"] = None
        elif h.num_experts is not None and h.expert_size is not None:
            changes["feed_forward_size"] = h.expert_size
        return changes

    @property
    def head_weight(self) -> Tensor:
        """[V, D] weight of the head."""
        return self.word_embedding.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """Word embeddings [B, L, D] of [B, L] ids, as the first block reads them; an image token's id beyond the
        vocabulary gives an arbitrary row, which the caller replaces."""
        x = self.word_embedding(token_ids.clamp(max=self.word_embedding.num_embeddings - 1))
        if self.embedding_multiplier == 1.0:
            return x
        # Rounded to the model's type before it multiplies, as Gemma was trained. Filled on the device: nothing waits.
        return x * torch.full((), self.embedding_multiplier, dtype=x.dtype, device=x.device)

    def word_ids(self, rows: Sequence[int]) -> Tensor:
        """Row numbers of the word embedding as ids on its device, [n] int64."""
        return torch.tensor(rows, dtype=torch.int64, device=self.word_embedding.weight.device)

    def behind_blocks(self, x: Tensor) -> Tensor:
        """The final norm, [B, L, D] -> [B, L, D]."""
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., D] -> [..., V]."""
        logits = nn.functional.linear(hidden, self.head_weight)
        return logits if self.logits_divisor == 1.0 else logits / self.logits_divisor

    def text_logits(self, token_ids: Tensor) -> Tensor:
        """Plain causal text through the language model alone.

        Args:
            token_ids: [B, L] int64.

        Returns:
            [B, L, V].

        Raises:
            ValueError: if an id is no row of the word embedding.
        """
        vocab_size = self.word_embedding.num_embeddings
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
            raise ValueError(
                f"token ids must lie in 0 to {vocab_size - 1}, got {int(token_ids.min())} to {int(token_ids.max())}"
            )
        none = torch.full_like(token_ids, NO_IMAGE)
        text = DocumentTokens(none[0].cpu(), kinds_of(none[0].cpu()), [])
        positions = self.rotary.variant.positions(text).expand(*token_ids.shape, 3).to(token_ids.device)
        return self.logits(self(self.embed(token_ids), positions, torch.zeros_like(token_ids), none))

    def init_new_from_llm(self) -> None:
        """Initializes what was added to a language model, H/W parts and experts, so that its output stays the same."""
        for block in self.blocks:
            self.init_new_in(block)

    def init_new_in(self, block: NativePrimitive) -> None:
        """The same in one block."""
        block.self_attn.init_hw_from_t()
        start_from(block.added)
