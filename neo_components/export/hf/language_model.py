"""Writes a post-LLM's T path as an ordinary causal language model, for those who want the language model alone.

An ordinary model cannot hold the pre-Buffer, the patch embedding, and the H and W channels of every head, so they are
left out. These act between words too once they are trained (text lies at H = W = 0, where they are not rotated, but
they still score), so the exported model computes what ``PostLLM.text_logits`` gives with its H/W keys at zero.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo_components.components.masks import dense_mask
from neo_components.components.post_llm import PostLLM
from neo_components.components.rotary import rotary_of
from neo_components.export.hf.text import chat_template, write_text_side
from neo_components.llms import Family, family_of
from neo_components.llms.layout import to_stored
from neo_components.registry import LLM_FAMILIES
from neo_components.storage.weights import save_folder
from neo_components.types import NO_IMAGE, DocumentTokens, kinds_of

NEO_ONLY = {
    "rope", "base_h", "base_w", "attention", "experts", "image_token_id", "image_start_id", "image_end_id", "source",
    "backend", "init_std",
}  # fmt: skip
"""Arguments of a post-LLM that say nothing of its T path."""

COMPARED = 64
"""Text tokens on which mask and positions are compared."""


def write_language_model(llm: PostLLM, tokenizer: Any, folder: str | Path, license: str = "") -> Path:
    """Writes weights, config, tokenizer, chat template and generation settings.

    Args:
        llm: read by ``PostLLM.from_pretrained``, or part of a model whose post-LLM was.
        tokenizer: Hugging Face tokenizer; image tokens that have no row in the word embedding are left out of it.
        folder: made if absent.
        license: license of the weights, for the model card.

    Returns:
        The folder, for ``AutoModelForCausalLM``.

    Raises:
        ValueError: if no model of transformers computes this T path; the message says why.
    """
    config, family = language_model_config(llm)
    _check_text(llm)
    template = chat_template(tokenizer, images=False)
    if llm.expert_modules():
        raise ValueError(
            "an ordinary language model has no experts for visual tokens; export the whole model (--to hf)"
        )
    new = {id(parameter) for part in llm.hw_modules() for parameter in part.parameters()}
    names = [name for name, parameter in llm.named_parameters() if id(parameter) not in new]
    full, sizes = llm.state_dict(), dict(llm.hparams)
    state = {name: full[name] for name in names}
    _check_names(config, family, state, sizes)
    folder = save_folder(folder, to_stored(state, family, sizes), config, _card(llm, config, license))
    write_text_side(_without_image_tokens(tokenizer, llm), folder, template)
    return folder


def language_model_config(llm: PostLLM) -> tuple[dict[str, Any], Family]:
    """The config of the language model that a T path is, and its family.

    Raises:
        ValueError: if it is not known, or is no model of transformers.
    """
    if llm.hf_config is None:
        raise ValueError(
            "this post-LLM was not read from a language model in the Hugging Face layout, so the form to write it in "
            "is not known; build it by PostLLM.from_pretrained, or export the whole model by --to hf"
        )
    faults = []
    for config in family_of(llm.hf_config).transformers_configs(llm.hf_config):
        kind = str(config["model_type"])
        fault = _differs(llm, config)
        if fault is None:
            dtype = str(llm.word_embedding.weight.dtype).removeprefix("torch.")
            own = {name: value for name, value in config.items() if name not in ("torch_dtype", "_name_or_path")}
            return own | {"architectures": [_class_name(kind)], "dtype": dtype}, family_of(config)
        faults.append(f"as {kind}: {fault}")
    raise ValueError(f"transformers has no model that computes this language model; {'; '.join(faults)}")


def _class_name(kind: str) -> str | None:
    """Class of a causal language model of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)


def _differs(llm: PostLLM, config: dict[str, Any]) -> str | None:
    """Why a config does not describe the T path; ``None`` if it does."""
    kind = config["model_type"]
    if kind not in LLM_FAMILIES or _class_name(kind) is None:
        return f"transformers has no causal language model of type {kind!r}"
    if "text_config" in config:
        return f"{_class_name(kind)} is more than a language model"
    try:
        said = family_of(config).arguments(config)
    except (KeyError, ValueError) as error:
        return str(error)
    defaults = {name: p.default for name, p in inspect.signature(PostLLM).parameters.items()}
    wanted = {name: value for name, value in llm.hparams.items() if name not in NEO_ONLY}
    given = {name: said.get(name, defaults[name]) for name in wanted}
    differ = [
        f"{n} is {wanted[n]!r}, the config says {given[n]!r}" for n in wanted if _plain(wanted[n]) != _plain(given[n])
    ]
    return "; ".join(differ) or None


def _plain(value: Any) -> str:
    """A value as JSON keeps it: a list and a tuple of the same are the same."""
    return json.dumps(value, sort_keys=True)


def _check_text(llm: PostLLM) -> None:
    """Refuses masks that do not read text causally, and RoPE that rotates the T channels of text by other angles.

    Raises:
        ValueError: naming it.
    """
    none = torch.full((1, COMPARED), NO_IMAGE, device="cpu")
    documents = torch.zeros_like(none)
    positions = llm.rotary.variant.positions(DocumentTokens(none[0], kinds_of(none[0]), []))[None]
    plain = torch.arange(COMPARED, device="cpu")[None, :, None].expand(1, COMPARED, 3)
    for layer in llm.blocks:
        rule, window = layer.layer_rule
        seen, usually = (dense_mask(documents, none, name, window) for name in (rule, "causal"))
        if not torch.equal(seen, usually):
            raise ValueError(f"attention {rule!r} does not read text causally, as a language model does")
        own, usual = rotary_of(layer.hparams), rotary_of(dict(layer.hparams) | {"rope": "native"})
        half = llm.hparams.head_width // 2
        for rotation, expected in zip(own(positions), usual(plain), strict=True):
            if not torch.equal(rotation[..., :half], expected[..., :half]):
                raise ValueError(
                    f"rope {llm.hparams.rope!r} rotates the T channels of text by other angles than a language model's"
                )


def _without_image_tokens(tokenizer: Any, llm: PostLLM) -> Any:
    """A tokenizer without the added tokens that have no row in the word embedding."""
    beyond = {token for token, row in tokenizer.get_added_vocab().items() if row >= llm.hparams.vocab_size}
    if not beyond:
        return tokenizer
    from tokenizers import Tokenizer

    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] not in beyond]
    options = {
        name: value for name, value in copy.deepcopy(tokenizer.init_kwargs).items() if name != "tokenizer_object"
    }
    for name in ("extra_special_tokens", "additional_special_tokens"):
        if isinstance(options.get(name), list):
            options[name] = [token for token in options[name] if str(token) not in beyond]
    options.pop("added_tokens_decoder", None)
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(description)), **options)


def _check_names(config: dict[str, Any], family: Family, state: dict[str, Tensor], sizes: dict[str, Any]) -> None:
    """Proves that transformers' own model of a config has these tensors and no other.

    Raises:
        ValueError: naming what differs.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]](**config))
    tied = set(model.all_tied_weights_keys)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    empty = {name: tensor.to("meta") for name, tensor in state.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in to_stored(empty, family, sizes, in_memory=True).items()}
    if differ := sorted(set(theirs.items()) ^ set(ours.items())):
        raise ValueError(
            f"the {config['model_type']} model of transformers has other tensors than this one: {differ[:5]}"
        )


def hw_is_silent(llm: PostLLM) -> bool:
    """Whether the H/W keys are all zero, so that nothing is lost between words."""
    return all(not bool(block.self_attn.k_proj_hw.weight.any()) for block in llm.blocks)


def what_is_lost(llm: PostLLM) -> list[str]:
    """What the exported language model does without, a sentence each."""
    lost = ["The pre-Buffer and the patch embedding are left out: it reads text only, no images."]
    if hw_is_silent(llm):
        return [*lost, "Its H/W keys are zero, so its logits are those of PostLLM.text_logits."]
    return [
        *lost,
        "The H and W channels of its heads are left out. They are trained and also act between words, so its logits "
        "are those of PostLLM.text_logits with the H/W keys at zero, and differ from the model's own.",
    ]


def _card(llm: PostLLM, config: dict[str, Any], license: str) -> str:
    lost = "".join(f"- {sentence}\n" for sentence in what_is_lost(llm))
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"license: {license or 'unknown'}\n---\n"
        "# Language model of a native vision-language model\n\n"
        f"The T path of the post-LLM of a NEO model (arXiv 2510.14979), {llm.hparams.depth} blocks, as "
        f"{config['model_type']}, written by neo-components.\n\n{lost}"
    )
