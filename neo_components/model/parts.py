"""The parts of a NEO model by name, as layouts, exports and saving read them."""

from __future__ import annotations

from neo_components.components.bridge import Bridge
from neo_components.components.component import Component
from neo_components.components.image_embedding import ImageEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.text_route import TextRoute


class NEOParts(Component):
    """Base of ``NEO``: its parts.

    Attributes:
        pre_buffer: with the patch embedding.
        post_llm: the widened language model.
        bridge_in: before the pre-Buffer; ``None``: none.
        bridge_out: behind it.
        route: path of text tokens.
    """

    pre_buffer: PreBuffer
    post_llm: PostLLM
    bridge_in: Bridge | None
    bridge_out: Bridge | None
    route: TextRoute

    @property
    def patch_embedding(self) -> ImageEmbedding:
        """The patch embedding layer."""
        assert self.pre_buffer.patch_embedding is not None
        return self.pre_buffer.patch_embedding

    @property
    def text(self) -> str:
        """Name of the text's route."""
        return self.route.text
