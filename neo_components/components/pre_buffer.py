"""The pre-Buffer: native primitives before the language model, and all that belongs to their side.

It carries the patch embedding layer and the two vectors that frame an image, so that its weights alone are the
reusable asset (NEO paper section 3.2): save it, load it in another project, attach it to another language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neo_components.components.backends import Attend
from neo_components.components.patch_embedding import PatchEmbedding
from neo_components.components.stack import PrimitiveStack
from neo_components.storage.asset_files import (
    ANCHORS,
    check_sizes,
    model_card,
    read_anchors,
    write_anchors,
    write_preprocessor,
)
from neo_components.storage.deferred import unfilled
from neo_components.storage.hub import resolve
from neo_components.storage.weights import (
    TensorFiles,
    as_dtype,
    load_strict,
    read_config,
    save_folder,
    settle,
)

FORMAT_VERSION = 1


@dataclass
class Anchors:
    """Word embeddings of common tokens, for fitting a bridge to another language model.

    Args:
        tokens: the A tokens as they read, spaces written as spaces (``vocabulary.token_strings``).
        vectors: [A, D] their word embeddings on the pre-Buffer's side.
    """

    tokens: list[str]
    vectors: Tensor


@dataclass
class AssetInfo:
    """What a saved pre-Buffer tells beside its weights.

    Args:
        image: normalisation and pixel limits of the images that it was trained with.
        provenance: recipe, data, steps, scores, library version: plain values.
        license: licence of the weights.
        card: text of the model card; a short one is written if empty.
    """

    image: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    card: str = ""


class PreBuffer(PrimitiveStack):
    """``depth`` native primitives of width D. The arguments are those of the post-LLM that it is trained with.

    Args:
        depth: number of primitives; 0 passes everything through.
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
            language models do otherwise than NEO. The defaults are NEO's, whatever the language model behind.
        backend: attention backend.
        init_std: standard deviation of the initial projections.

    Attributes:
        patch_embedding: the :class:`PatchEmbedding` in front of it, once :meth:`adopt` or ``NEO`` joined them.
        boundary: [2, D] vectors of the tokens ``<img>`` and ``</img>``.
        anchors: :class:`Anchors` of the language model that it was trained with, if known.
        info: :class:`AssetInfo`.
    """

    patch_embedding: PatchEmbedding | None

    def __init__(
        self,
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
        backend: str = "auto",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.build()
        self.patch_embedding = None
        self.boundary = nn.Parameter(torch.randn(2, hidden_size) * init_std)
        self.anchors: Anchors | None = None
        self.info = AssetInfo()

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor,
        image_ids: Tensor,
        attend: Attend | Sequence[Attend] | None = None,
    ) -> Tensor:
        """Maps embedded tokens, visual and text alike.

        Args:
            x: [B, L, D].
            positions: [B, L, 3].
            document_ids: [B, L].
            image_ids: [B, L].
            attend: a backend prepared by the caller.

        Returns:
            [B, L, D].
        """
        return self.run(x, positions, document_ids, image_ids, attend)

    def adopt(self, patch_embedding: PatchEmbedding) -> None:
        """Joins a patch embedding layer, which becomes part of the asset.

        Raises:
            ValueError: if the widths differ.
        """
        if patch_embedding.hparams.hidden_size != self.hparams.hidden_size:
            raise ValueError(
                f"patch embedding of hidden size {patch_embedding.hparams.hidden_size} does not fit "
                f"a pre-Buffer of hidden size {self.hparams.hidden_size}"
            )
        self.patch_embedding = patch_embedding

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the asset: config.json, model.safetensors, preprocessor_config.json, README.md, and
        anchors.safetensors if there are anchors. The same content gives the same bytes.

        Raises:
            ValueError: if no patch embedding was joined.
        """
        if self.patch_embedding is None:
            raise ValueError("a pre-Buffer is saved with its patch embedding; join one by NEO(...) or adopt(...)")
        config: dict[str, Any] = {
            "library": "neo_components",
            "kind": "pre_buffer",
            "format_version": FORMAT_VERSION,
            "pre_buffer": dict(self.hparams) | {"backend": "auto"},
            "patch_embedding": dict(self.patch_embedding.hparams),
            "image": self.info.image,
            "provenance": self.info.provenance,
            "license": self.info.license,
        }
        folder = save_folder(folder, self.state_dict(), config, self.info.card or model_card(config))
        write_preprocessor(folder, self.info.image, config["patch_embedding"])
        (folder / f"{ANCHORS}.safetensors").unlink(missing_ok=True)  # of an earlier save
        if self.anchors is not None:
            write_anchors(folder, self.anchors.tokens, self.anchors.vectors)
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype | str = "float32") -> PreBuffer:
        """Reads an asset from a folder or hub repository. No random numbers are drawn for it.

        Args:
            source: folder or hub id.
            dtype: of the weights in memory, whatever the files hold: float32, bfloat16 or float16.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no pre-Buffer, too new, or its tensors do not fit.
        """
        dtype = as_dtype(dtype)
        folder = resolve(source)
        config = read_config(folder)
        if config.get("library") != "neo_components" or config.get("kind") != "pre_buffer":
            raise ValueError(f"{folder} holds no pre-Buffer but {config.get('kind', config.get('model_type'))!r}")
        check_format(config, folder)
        files = TensorFiles(folder)
        check_sizes(config, files)
        try:
            with unfilled():
                module = cls(**config["pre_buffer"])
                module.adopt(PatchEmbedding(**config["patch_embedding"]))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{folder}/config.json does not describe a pre-Buffer: {error}") from error
        load_strict(module, files, dtype=dtype)
        settle(module, dtype)
        module.info = AssetInfo(
            config.get("image", {}), config.get("provenance", {}), config.get("license", ""), _read_card(folder)
        )
        if (table := read_anchors(folder, module.hparams.hidden_size)) is not None:
            module.anchors = Anchors(*table)
        return module

    def push_to_hub(self, repo: str, **options: Any) -> None:
        """Publishes the asset as a hub repository.

        Args:
            repo: ``owner/name``.
            options: passed on to ``HfApi.create_repo`` (``private``, ``token`` ...).
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=options.get("token"))
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo, exist_ok=True, **options)
            api.upload_folder(repo_id=repo, folder_path=folder)


def check_format(config: dict[str, Any], folder: Path) -> None:
    """Refuses what a later version of the library wrote.

    Raises:
        ValueError: if ``format_version`` is missing or newer than this library's.
    """
    version = config.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format_version {version!r}, this library reads up to {FORMAT_VERSION}; "
            "upgrade neo-components to open it"
        )


def _read_card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
