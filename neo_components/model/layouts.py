"""Checkpoint layouts of NEO models: our own, and the released one of the training or inference kit. Always strict.

Both are read into the same parts; ``NEO.from_pretrained`` distinguishes them by config.json.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_components.components.block_arguments import PARAMETERS
from neo_components.components.bridge import bridge_config, bridge_from
from neo_components.components.image_embedding import embedding_config, embedding_from
from neo_components.components.patch_embeddings.neo import PatchEmbedding
from neo_components.components.post_llm import PostLLM
from neo_components.components.post_llm_files import image_token_ids
from neo_components.components.pre_buffer import PreBuffer
from neo_components.components.pre_buffer_files import FORMAT_VERSION, check_format
from neo_components.llms.family import require
from neo_components.llms.qwen3 import Qwen3
from neo_components.model.parts import NEOParts
from neo_components.storage.deferred import later
from neo_components.storage.shards import set_rows
from neo_components.storage.weights import TensorFiles, load_strict, materialize, save_folder, save_tensors

log = logging.getLogger(__name__)

BOUNDARY = "boundary"
"""File beside released weights: vectors of ``<img>`` and ``</img>``, where the vocabulary has no rows for them."""

CONFIGS = ("llm_config", "vision_config")
"""The sections of a released config."""

RENAMED = {"unturned_layers": "nope_layers"}
"""Arguments of the post-LLM that models written earlier have under another name."""

Parts = dict[str, Any]
"""Keyword arguments of ``NEO``."""


def layout_of(config: dict[str, Any], folder: Path) -> str:
    """``neo_components`` or ``released``.

    Raises:
        ValueError: if it is neither.
    """
    if config.get("library") == "neo_components" and config.get("kind") == "neo":
        return "neo_components"
    if config.get("model_type") == "neo_chat":
        return "released"
    kind = config.get("kind") or config.get("model_type")
    advice = {
        "pre_buffer": "; it is a pre-Buffer: load it by PreBuffer.from_pretrained and attach it",
        None: "",
    }.get(kind, "; if it is a language model, load it by PostLLM.from_pretrained")
    raise ValueError(f"{folder} is no NEO checkpoint (config.json states {kind!r}){advice}")


def own_config(model: NEOParts) -> dict[str, Any]:
    """config.json of our own layout: the plain keyword arguments of every part."""
    return {
        "library": "neo_components",
        "kind": "neo",
        "format_version": FORMAT_VERSION,
        "patch_embedding": embedding_config(model.patch_embedding),
        "pre_buffer": dict(model.pre_buffer.hparams) | {"backend": "auto"},
        "post_llm": dict(model.post_llm.hparams) | {"backend": "auto"},
        "bridge_in": bridge_config(model.bridge_in),
        "bridge_out": bridge_config(model.bridge_out),
        "text": model.text,
        "language_model": model.post_llm.hf_config,
    }


def parts_from_own(config: dict[str, Any], folder: Path) -> Parts:
    """Empty parts as an own config describes them.

    Raises:
        ValueError: if a later version wrote it, or it lacks a part or has wrong arguments.
    """
    check_format(config, folder)
    try:
        parts: Parts = {
            "patch_embedding": embedding_from(config["patch_embedding"]),
            "pre_buffer": PreBuffer(**config["pre_buffer"]),
            "post_llm": PostLLM(**{RENAMED.get(name, name): value for name, value in config["post_llm"].items()}),
            "bridge_in": bridge_from(config.get("bridge_in")),
            "bridge_out": bridge_from(config.get("bridge_out")),
        }
        parts["text"] = config.get("text", "shared")
        parts["post_llm"].hf_config = config.get("language_model")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json does not describe a NEO model: {error}") from error
    return parts


def parts_from_released(config: dict[str, Any], folder: Path) -> Parts:
    """Empty parts as a released config of either kit describes them.

    ``layer_types`` is ignored: the training kit writes 32 entries whatever the depth. A number may be a list of one
    element, from a tuple that a trailing comma made.

    Raises:
        ValueError: if a setting is not supported or missing.
    """
    try:
        return _parts_from_released(config, folder)
    except KeyError as error:
        raise ValueError(f"{folder}/config.json lacks {error} of the released NEO layout") from error


def _parts_from_released(config: dict[str, Any], folder: Path) -> Parts:
    llm, vision = ({name: _scalar(value) for name, value in config[part].items()} for part in CONFIGS)
    require(llm, {"use_sliding_window": (False,), "attention_bias": (False,)})
    if llm.get("rope_theta") is None and "rope_theta" not in (llm.get("rope_parameters") or {}):
        raise ValueError(f"{folder}/config.json gives no rope_theta")
    sizes = Qwen3().arguments(llm | {"layer_types": None, "tie_word_embeddings": is_tied(config)})
    if scaling := sizes.get("rope_scaling"):
        raise ValueError(f"rope scaling {scaling['rope_type']!r} is not part of the released NEO layout")
    total, before = llm["num_hidden_layers"], llm.get("extra_num_layers", 0)
    base_hw = float(llm.get("rope_theta_hw", 1e4))
    same = {name: value for name, value in sizes.items() if name in PARAMETERS} | {"base_h": base_hw, "base_w": base_hw}
    ratio = vision.get("downsample_ratio", config.get("downsample_ratio"))
    parts: Parts = {
        "patch_embedding": PatchEmbedding(
            hidden_size=sizes["hidden_size"],
            width=vision["hidden_size"],
            patch_size=vision["patch_size"],
            fold=round(1 / float(_scalar(0.5 if ratio is None else ratio))),
            channels=vision.get("num_channels", 3),
            base=float(vision.get("rope_theta_vision", 1e4)),
        ),
        "pre_buffer": PreBuffer(depth=before, **same),
        "post_llm": PostLLM(
            vocab_size=sizes["vocab_size"],
            depth=total - before,
            tie_embeddings=sizes["tie_embeddings"],
            **same,
            **_image_ids(config, folder, sizes["vocab_size"]),
        ),
    }
    parts["post_llm"].hf_config = _language_model(llm, total - before, sizes["tie_embeddings"])
    return parts


def _language_model(llm: dict[str, Any], depth: int, tied: bool) -> dict[str, Any]:
    """The config of the language model inside a released one."""
    released_only = ("extra_num_layers", "rope_theta_hw", "layer_types", "max_window_layers", "auto_map")
    own = {name: value for name, value in llm.items() if name not in released_only}
    return own | {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": depth,
        "tie_word_embeddings": tied,
    }  # fmt: skip


def is_tied(config: dict[str, Any]) -> bool:
    """Whether a released config ties the head to the word embedding; either level may state it."""
    return bool(_scalar(config.get("tie_word_embeddings", config["llm_config"].get("tie_word_embeddings", False))))


def _scalar(value: Any) -> Any:
    """The value of a field that was written as a tuple by accident (a trailing comma)."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _image_ids(config: dict[str, Any], folder: Path, vocab_size: int) -> dict[str, Any]:
    """The image tokens' ids. They are added to the tokenizer in one go, visual token, ``<img>``, ``</img>``; the config
    of the inference kit states none, so there the folder's tokenizer does, or else they are those of the released
    tokenizers."""
    config = {name: _scalar(value) for name, value in config.items()}
    token = config.get("img_context_token_id")
    if token is None and (folder / "tokenizer.json").is_file():
        return image_token_ids(folder, vocab_size)
    if token is None:
        token = RELEASED_IMAGE_TOKEN if vocab_size > RELEASED_IMAGE_TOKEN + 2 else vocab_size
        log.warning("%s names no image tokens and has no tokenizer.json; taking ids from %d on", folder, token)
    start = config.get("img_start_token_id", token + 1)
    end = config.get("img_end_token_id", start + 1)
    return {"image_token_id": token, "image_start_id": start, "image_end_id": end}


RELEASED_IMAGE_TOKEN = 151669
"""Id of ``<IMG_CONTEXT>`` in the Qwen3 vocabulary: the first one behind its 151,669 tokens."""


class Released:
    """Names and forms of the released layout for a model of ``before`` pre-Buffer layers."""

    def __init__(self, before: int, fold: int, channels: int, patch_size: int) -> None:
        self.before, self.fold, self.channels, self.patch_size = before, fold, channels, patch_size

    def rename(self, name: str) -> str:
        """Our name -> the released one."""
        embedding = "pre_buffer.patch_embedding."
        if name.startswith(embedding):
            part = name.removeprefix(embedding).replace("patch_proj", "patch_embedding")
            return "vision_model.embeddings." + part.replace("token_proj", "dense_embedding")
        if name.startswith("pre_buffer.layers."):
            return "language_model.model." + name.removeprefix("pre_buffer.")
        part = name.removeprefix("post_llm.")
        if part.startswith("layers."):
            _, number, rest = part.split(".", 2)
            return f"language_model.model.layers.{int(number) + self.before}.{rest}"
        if part.startswith("lm_head."):
            return "language_model." + part
        return "language_model.model." + part.replace("word_embedding", "embed_tokens")

    def read(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """How stored tensors become ours: convolutions become matrices."""
        return {
            "pre_buffer.patch_embedding.patch_proj.weight": lambda w: w.flatten(1),
            "pre_buffer.patch_embedding.token_proj.weight": lambda w: w.permute(0, 2, 3, 1).flatten(1),
        }

    def write(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`read`."""
        if name == "pre_buffer.patch_embedding.patch_proj.weight":
            return tensor.unflatten(1, (self.channels, self.patch_size, self.patch_size))
        if name == "pre_buffer.patch_embedding.token_proj.weight":
            return tensor.unflatten(1, (self.fold, self.fold, -1)).permute(0, 3, 1, 2)
        return tensor


def load_released(model: NEOParts, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Fills a model on the meta device from released weights; the vectors of ``<img>`` and ``</img>`` come from their
    word embeddings.

    Raises:
        ValueError: if the tensors do not fit.
    """
    released = released_of(model)
    boundary = "pre_buffer.boundary"
    files = TensorFiles(folder)
    load_strict(model, files, released.rename, released.read(), only=lambda name: name != boundary, dtype=dtype)
    materialize(model, dtype)
    table, rows = released.rename("post_llm.word_embedding.weight"), _boundary_rows(model)
    vectors = torch.empty(model.pre_buffer.boundary.shape)
    if (folder / f"{BOUNDARY}.safetensors").is_file():
        vectors.copy_(TensorFiles(folder, BOUNDARY).get(BOUNDARY))
    elif len(rows) < 2:
        log.warning("%s has no vectors of <img> and </img>, by their ids or beside; they start as random", folder)
        vectors.normal_(0.0, model.pre_buffer.hparams.init_std)
    for index, row in rows.items():
        vectors[index] = files.rows(table, row, row + 1)[0]
    later(model.pre_buffer, lambda: set_rows(model.pre_buffer.boundary, vectors))


def save_released(model: NEOParts, folder: str | Path) -> Path:
    """Writes the released layout with the training kit's config.

    Raises:
        ValueError: if the model has what that layout cannot express: bridges, another RoPE or mask, other sizes of
            pre-Buffer and post-LLM.
    """
    _check_expressible(model)
    released = released_of(model)
    state = {
        released.rename(name): released.write(name, tensor)
        for name, tensor in model.state_dict().items()
        if name != "pre_buffer.boundary"
    }
    embedding = state["language_model.model.embed_tokens.weight"].clone()
    for index, row in _boundary_rows(model).items():
        embedding[row] = model.pre_buffer.boundary[index]
    state["language_model.model.embed_tokens.weight"] = embedding
    folder = save_folder(folder, state, released_config(model))
    (folder / f"{BOUNDARY}.safetensors").unlink(missing_ok=True)  # of an earlier save
    if len(_boundary_rows(model)) < 2:
        # The released layout keeps the two vectors in the word embedding; here they have no rows there.
        save_tensors(folder / f"{BOUNDARY}.safetensors", {BOUNDARY: model.pre_buffer.boundary})
    return folder


def released_of(model: NEOParts) -> Released:
    """The released names of that model."""
    patch = model.patch_embedding.hparams
    return Released(model.pre_buffer.hparams.depth, patch.fold, patch.channels, patch.patch_size)


def _boundary_rows(model: NEOParts) -> dict[int, int]:
    """Index of a boundary vector -> row of the word embedding, for those that have one."""
    h = model.post_llm.hparams
    return {n: row for n, row in enumerate((h.image_start_id, h.image_end_id)) if row < h.vocab_size}


def _check_expressible(model: NEOParts) -> None:
    pre, post, patch = model.pre_buffer.hparams, model.post_llm.hparams, model.patch_embedding.hparams
    faults = [f"{name}: pre-Buffer {pre[name]}, post-LLM {post[name]}" for name in STATED if pre[name] != post[name]]
    faults += [f"{name}: {h[name]!r} (only {value!r})" for h in (pre, post) for name, value in _unstated(h).items()]
    faults += [f"{name} is not None" for name in ("bridge_in", "bridge_out") if getattr(model, name) is not None]
    faults += [f"text {model.text!r} (only 'shared')"] if not model.route.words_pass else []
    faults += [f"rope {h.rope!r} (only 'native')" for h in (pre, post) if h.rope != "native"]
    faults += [f"attention {h.attention!r} (only 'mixed')" for h in (pre, post) if h.attention != "mixed"]
    if post.base_h != post.base_w:
        faults.append(f"base_h {post.base_h} differs from base_w {post.base_w}")
    if type(model.patch_embedding) is not PatchEmbedding:
        faults.append(f"patch embedding {type(model.patch_embedding).__name__} (only NEO's own)")
    elif patch.position != "rotary":
        faults.append(f"patch position {patch.position!r} (only 'rotary')")
    if faults:
        raise ValueError(
            'layout="released" cannot hold this model; use layout="neo_components":\n  ' + "\n  ".join(faults)
        )


STATED = (
    "hidden_size", "num_heads", "num_kv_heads", "head_width", "feed_forward_size", "norm_eps",
    "base_t", "base_h", "base_w",
)  # fmt: skip
"""Arguments of a block that a released config can express; ``rope`` and ``attention`` are checked separately."""


def _unstated(hparams: Any) -> dict[str, Any]:
    """Arguments that differ from NEO on Qwen3 -> the only value that a released model has."""
    defaults = {name: entry.default for name, entry in inspect.signature(PostLLM).parameters.items()}
    names = {*PARAMETERS, "nope_layers", "embedding_multiplier", "logits_divisor"} - {*STATED, "rope", "attention"}
    return {name: defaults[name] for name in sorted(names & set(hparams)) if hparams[name] not in (defaults[name], [])}


def released_config(model: NEOParts) -> dict[str, Any]:
    """config.json as the released training kit reads it."""
    pre, post, patch = model.pre_buffer.hparams, model.post_llm.hparams, model.patch_embedding.hparams
    layers = pre.depth + post.depth
    return {
        "architectures": ["NEOChatModel"],
        "model_type": "neo_chat",
        "dtype": str(model.dtype).removeprefix("torch."),
        "hidden_size": post.hidden_size,
        "img_context_token_id": post.image_token_id,
        "img_start_token_id": post.image_start_id,
        "img_end_token_id": post.image_end_id,
        "downsample_ratio": 1 / patch.fold,
        "tie_word_embeddings": post.tie_embeddings,
        "llm_config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "extra_num_layers": pre.depth,
            "head_dim": post.head_width,
            "hidden_act": "silu",
            "hidden_size": post.hidden_size,
            "intermediate_size": post.feed_forward_size,
            "layer_types": ["full_attention"] * layers,
            "num_attention_heads": post.num_heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": post.num_kv_heads,
            "rms_norm_eps": post.norm_eps,
            "rope_scaling": None,
            "rope_theta": post.base_t,
            "rope_theta_hw": post.base_h,
            "tie_word_embeddings": post.tie_embeddings,
            "use_sliding_window": False,
            "vocab_size": post.vocab_size,
        },
        "vision_config": {
            "architectures": ["NEOVisionModel"],
            "model_type": "neo_vision",
            "downsample_ratio": 1 / patch.fold,
            "hidden_size": patch.width,
            "llm_hidden_size": patch.hidden_size,
            "num_channels": patch.channels,
            "patch_size": patch.patch_size,
            "rope_theta_vision": patch.base,
        },
    }
