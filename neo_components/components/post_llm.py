"""The post-LLM: a pretrained language model whose blocks got height and width channels.

At the start the new keys are zero, so the H/W score is exactly 0 and text reads as in the language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.backends import Attend
from neo_components.components.layers import RMSNorm
from neo_components.components.stack import PrimitiveStack
from neo_components.llms import arguments_of, family_of
from neo_components.llms.layout import FamilyFiles
from neo_components.storage.deferred import unfilled
from neo_components.storage.hub import resolve
from neo_components.storage.weights import TensorFiles, as_dtype, load_strict, read_config, settle
from neo_components.types import NO_IMAGE


class PostLLM(PrimitiveStack):
    """Word embedding, ``depth`` native primitives, final norm and head.

    Args:
        vocab_size: V.
        depth: number of blocks.
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K.
        head_width: E.
        feed_forward_size: width of the gated feed-forward.
        norm_eps: of all norms.
        rope: registered name of the RoPE variant.
        base_t: base of the T frequencies.
        base_h: base of the H frequencies.
        base_w: base of the W frequencies.
        attention: registered name of the mask rule.
        rope_scaling: this and the arguments up to ``normalize_experts`` are those of :class:`NativePrimitive`: what
            language models do otherwise than NEO on Qwen3.
        window_layers: numbers of the blocks that have the window; ``None``: all.
        window_base_t: base of the T frequencies in those blocks, unscaled; ``None``: like the others.
        nope_layers: numbers of the blocks whose T channels do not turn (NoPE); ``None``: none.
        expert_layers: numbers of the blocks that have experts; ``None``: all.
        expert_size: width of one expert; ``None``: ``feed_forward_size``.
        embedding_multiplier: factor of the word embeddings. Visual tokens are put in after it.
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
        hf_config: config of the language model that it was read from, to write it back; ``None`` if it was built anew.
    """

    hf_config: dict[str, Any] | None = None

    def __init__(
        self,
        vocab_size: int,
        depth: int,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_width: int,
        feed_forward_size: int,
        norm_eps: float = 1e-6,
        rope: str = "native",
        base_t: float = 1e6,
        base_h: float = 1e4,
        base_w: float = 1e4,
        attention: str = "mixed",
        rope_scaling: Mapping[str, Any] | None = None,
        rotary_width: int | None = None,
        window: int | None = None,
        attention_scale: float | None = None,
        qk_norm: str = "head",
        qkv_bias: bool = False,
        output_bias: bool = False,
        norm: str = "weight",
        norm_placement: str = "before",
        residual_multiplier: float = 1.0,
        activation: str = "silu",
        feed_forward_bias: bool = False,
        num_experts: int | None = None,
        experts_per_token: int = 8,
        normalize_experts: bool = True,
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
    ) -> None:
        super().__init__()
        image_token_id = vocab_size if image_token_id is None else image_token_id
        image_start_id = image_token_id + 1 if image_start_id is None else image_start_id
        image_end_id = image_start_id + 1 if image_end_id is None else image_end_id
        self.save_hyperparameters()
        self.build()
        self.word_embedding = nn.Embedding(vocab_size, hidden_size)
        nn.init.normal_(self.word_embedding.weight, 0.0, init_std)
        self.norm = RMSNorm(hidden_size, norm_eps, norm)
        self.lm_head: nn.Linear | None = None
        if not tie_embeddings:
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, 0.0, init_std)

    def build(self) -> None:
        """Makes the blocks.

        Raises:
            ValueError: if a list names blocks that are not there, or an argument refines one that is not given.
        """
        h = self.hparams
        for name in ("window_layers", "nope_layers", "expert_layers"):
            if wrong := [number for number in h[name] or () if not 0 <= number < h.depth]:
                raise ValueError(f"{name} names block {wrong[0]}, but a depth of {h.depth} has 0 to {h.depth - 1}")
        refined = {"window": ("window_layers", "window_base_t"), "num_experts": ("expert_layers", "expert_size")}
        for name, finer in refined.items():
            if lost := [finer_name for finer_name in finer if h[finer_name] is not None and h[name] is None]:
                raise ValueError(f"{lost[0]} says nothing without {name}, which is not given")
        super().build()

    def block_changes(self, number: int) -> dict[str, Any]:
        """What block ``number`` has other than the arguments for all blocks say."""
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
        """Word embeddings [B, L, D] of [B, L] ids, as the first block wants them; an image token's id beyond the
        vocabulary gives an arbitrary row, which the caller replaces."""
        x = self.word_embedding(token_ids.clamp(max=self.word_embedding.num_embeddings - 1))
        if self.hparams.embedding_multiplier == 1.0:
            return x
        # Rounded to the model's type before it multiplies, as Gemma was trained.
        return x * torch.tensor(self.hparams.embedding_multiplier, dtype=x.dtype, device=x.device)

    def word_ids(self, rows: Sequence[int]) -> Tensor:
        """Those rows of the word embedding as ids on its device, [n] int64."""
        return torch.tensor(rows, dtype=torch.int64, device=self.word_embedding.weight.device)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        image_ids: Tensor,
        attend: Attend | Sequence[Attend] | None = None,
        hidden_states: dict[str, Tensor] | None = None,
        first: int = 0,
    ) -> Tensor:
        """All blocks and the final norm, [B, L, D] -> [B, L, D]; arguments as in :meth:`PrimitiveStack.run`."""
        return self.norm(self.run(x, positions, document_ids, image_ids, attend, hidden_states, first))

    def logits(self, hidden: Tensor) -> Tensor:
        """The head: [..., D] -> [..., V]."""
        logits = nn.functional.linear(hidden, self.head_weight)
        return logits if self.hparams.logits_divisor == 1.0 else logits / self.hparams.logits_divisor

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
        rows, length = token_ids.shape
        none = torch.full_like(token_ids, NO_IMAGE)
        positions = self.rotary.index_rule(none[0].cpu(), [])[None].expand(rows, length, 3).to(token_ids.device)
        return self.logits(self(self.embed(token_ids), positions, torch.zeros_like(token_ids), none))

    @torch.no_grad()
    def init_hw_from_t(self) -> None:
        """Sets the H/W parts of every block to the start that leaves the language model unchanged."""
        for layer in self.layers:
            layer.self_attn.init_hw_from_t()  # type: ignore[union-attr, operator]

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        rope: str = "native",
        base_h: float = 1e4,
        base_w: float = 1e4,
        attention: str = "mixed",
        backend: str = "auto",
        dtype: torch.dtype | str = "float32",
    ) -> PostLLM:
        """Reads a language model in the Hugging Face layout and widens it. No random numbers are drawn for it.

        Args:
            source: folder or hub id; safetensors, one file or several.
            rope: registered name of the RoPE variant.
            base_h: base of the new H frequencies; that of T is the language model's.
            base_w: base of the new W frequencies.
            attention: registered name of the mask rule.
            backend: attention backend.
            dtype: of the weights in memory, whatever the files hold: float32, bfloat16 or float16.

        Raises:
            FileNotFoundError: if there is no checkpoint, or only a pickled one.
            ValueError: if the family or a setting is not supported, or the tensors do not fit.
        """
        dtype = as_dtype(dtype)
        folder = resolve(source)
        config = read_config(folder)
        family = family_of(config)
        sizes = arguments_of(config, folder, inspect.signature(cls).parameters)
        ids = image_token_ids(folder, sizes["vocab_size"])
        with unfilled():
            module = cls(
                **sizes, **ids, rope=rope, base_h=base_h, base_w=base_w, attention=attention, source=str(source),
                backend=backend,
            )  # fmt: skip
        names = [name for name in module.state_dict() if _is_pretrained(name)]
        files = FamilyFiles(TensorFiles(folder), family, sizes, names)
        load_strict(module, files, files.rename, ignore=files.superfluous(), only=_is_pretrained, dtype=dtype)
        settle(module, dtype)
        module.init_hw_from_t()
        module.hf_config = config
        return module


def _is_pretrained(name: str) -> bool:
    """Whether a weight of the post-LLM exists in the language model: all but the H/W parts."""
    part = name.split(".")[-2]
    return part not in {"q_proj_hw", "k_proj_hw", "q_norm_h", "q_norm_w", "k_norm_h", "k_norm_w"}


IMAGE_TOKENS = {"image_token_id": "<IMG_CONTEXT>", "image_start_id": "<img>", "image_end_id": "</img>"}


def image_token_ids(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Ids of the image tokens: those of the folder's tokenizer, else the next free ones, in the order of
    ``IMAGE_TOKENS``; a folder without tokenizer counts on from ``vocab_size``."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return {name: vocab_size + place for place, name in enumerate(IMAGE_TOKENS)}
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    # add_special_tokens leaves known tokens as they are, and is what load_tokenizer does to the same file.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in IMAGE_TOKENS.values()])
    return {name: tokenizer.token_to_id(token) for name, token in IMAGE_TOKENS.items()}
