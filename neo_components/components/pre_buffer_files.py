"""The files of a pre-Buffer asset: saving, loading, publishing (``docs/asset.md``)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from neo_components.components.asset_info import Anchors, AssetInfo
from neo_components.components.component import Component
from neo_components.components.image_embedding import ImageEmbedding, embedding_config, embedding_from
from neo_components.storage.asset_files import (
    ANCHORS,
    check_sizes,
    model_card,
    read_anchors,
    write_anchors,
    write_preprocessor,
)
from neo_components.storage.deferred import unfilled
from neo_components.storage.pretrained import resolve_asset
from neo_components.storage.weights import TensorFiles, as_dtype, load_strict, materialize, read_config, save_folder

FORMAT_VERSION = 1


class PreBufferFiles(Component):
    """Saving and loading of a ``PreBuffer``."""

    patch_embedding: ImageEmbedding | None
    anchors: Anchors | None
    info: AssetInfo
    source: str = ""
    """Name, folder or hub id that it was read from."""

    if TYPE_CHECKING:

        def adopt(self, patch_embedding: ImageEmbedding) -> None: ...

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
            "patch_embedding": embedding_config(self.patch_embedding),
            "image": self.info.image,
            "provenance": self.info.provenance,
            "license": self.info.license,
        }
        e = self.patch_embedding
        card = self.info.card or model_card(config, e.patch_size * e.fold)
        folder = save_folder(folder, self.state_dict(), config, card)
        write_preprocessor(
            folder, self.info.image, {"patch_size": e.patch_size, "fold": e.fold, "channels": e.channels}
        )
        (folder / f"{ANCHORS}.safetensors").unlink(missing_ok=True)  # of an earlier save
        if self.anchors is not None:
            write_anchors(folder, self.anchors.tokens, self.anchors.vectors)
        return folder

    @classmethod
    def from_pretrained(cls, source: str | Path, *, dtype: torch.dtype | str = "float32") -> Self:
        """Reads an asset. No random numbers are drawn for it.

        Args:
            source: ``pretrained:NAME`` of one that ships (``neo pretrained list``), or a folder or hub id.
            dtype: of the weights in memory, whatever the files hold: float32, bfloat16 or float16.

        Raises:
            FileNotFoundError: if there is none, or a file of one that ships is missing.
            ValueError: if it is no pre-Buffer, too new, its tensors do not fit, or a checksum differs.
        """
        dtype = as_dtype(dtype)
        folder = resolve_asset(source)
        config = asset_config(folder)
        files = TensorFiles(folder)
        check_sizes(config, files)
        try:
            with unfilled():
                module = cls(**config["pre_buffer"])
                module.adopt(embedding_from(config["patch_embedding"]))
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{folder}/config.json does not describe a pre-Buffer: {error}") from error
        load_strict(module, files, dtype=dtype)
        materialize(module, dtype)
        module.info = AssetInfo(
            config.get("image", {}), config.get("provenance", {}), config.get("license", ""), _read_card(folder)
        )
        module.source = str(source)
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


def asset_config(folder: Path) -> dict[str, Any]:
    """config.json of an asset's folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no asset's, or a later version of the library wrote it.
    """
    config = read_config(folder)
    if config.get("library") != "neo_components" or config.get("kind") != "pre_buffer":
        raise ValueError(f"{folder} holds no pre-Buffer but {config.get('kind', config.get('model_type'))!r}")
    check_format(config, folder)
    return config


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
