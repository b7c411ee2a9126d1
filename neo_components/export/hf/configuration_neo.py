"""The config of an exported model: the keyword arguments of its parts, as transformers reads and writes them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class NEOConfig(PreTrainedConfig):
    """What ``config.json`` of an exported folder says.

    Attributes:
        patch_embedding: keyword arguments of ``PatchEmbedding``.
        pre_buffer: of ``PreBuffer``.
        post_llm: of ``PostLLM``.
        bridge_in: of the ``Bridge`` before the pre-Buffer; ``None`` where there is none.
        bridge_out: of the ``Bridge`` behind it.
        use_cache: whether keys and values are kept by default.
    """

    model_type = "neo_components"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - a class attribute of transformers

    patch_embedding: dict[str, Any] | None = None
    pre_buffer: dict[str, Any] | None = None
    post_llm: dict[str, Any] | None = None
    bridge_in: dict[str, Any] | None = None
    bridge_out: dict[str, Any] | None = None
    use_cache: bool = True

    @property
    def vocab_size(self) -> int:
        """V."""
        return (self.post_llm or {})["vocab_size"]

    @property
    def hidden_size(self) -> int:
        """D of the post-LLM."""
        return (self.post_llm or {})["hidden_size"]

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of pre-Buffer and post-LLM; each keeps keys and values of its own."""
        return (self.pre_buffer or {})["depth"] + (self.post_llm or {})["depth"]

    @property
    def image_token_id(self) -> int:
        """Id that stands for one visual token."""
        return (self.post_llm or {})["image_token_id"]
