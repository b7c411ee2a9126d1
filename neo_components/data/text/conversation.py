"""From a conversation to token ids and labels.

Conversations are in LLaVA form: a list of turns ``{"from": "human" | "gpt" | "system", "value": str}``. Each
``<image>`` in a text stands for one image, in order. They are written by the tokenizer's own chat template; where it
has none, in ChatML, as NEO is trained::

    <|im_start|>user
    <img><IMG_CONTEXT>...</img>
    What is it?<|im_end|>
    <|im_start|>assistant
    An apple.<|im_end|>

The targets of a conversation are its answers, each with the token that ends it (in plain ChatML ``<|im_end|>`` and the
line break after it); an answer marked ``"is_input": true`` is input, no target. The text is tokenized in pieces that
are cut where an answer begins and after its end, in training and at inference alike, so the prompt of a model is
exactly the beginning of what it was trained on. The beginning-of-text token stands where the template writes it, and
nowhere else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neo_components.data.text.templates import CHATML, TURN_END, TURN_START, template_of
from neo_components.data.text.token_ids import cut, image_token_ids, tokenize
from neo_components.data.text.turns import (
    IMAGE_TOKENS,
    ConversationError,
    Turn,
    checked_turns,
    known_turns,
    with_images,
)
from neo_components.storage.hub import resolve
from neo_components.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def encode_conversation(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[int] = (),
    max_length: int | None = None,
    *,
    strict: bool = False,
    image_ids: tuple[int, int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Token ids and labels of one conversation. ``turns`` is not changed.

    One image whose tag is missing altogether is put in front of the first human turn.

    Args:
        turns: ``{"from": "human" | "gpt" | "system", "value": str}`` each; an empty system turn is left out.
        tokenizer: from :func:`load_tokenizer`.
        image_tokens: number of visual tokens of each image.
        max_length: cut the conversation to this many tokens.
        strict: also refuse what the reference takes as it comes: more ``<image>`` tags than images (the rest stays
            plain text), turns of an unknown role (left out), reserved tokens in the text, a conversation with nothing
            to learn. The data pipeline is strict.
        image_ids: the model's own ids of the visual token, ``<img>`` and ``</img>``
            (``InputSpec.image_special_token_ids``) if they differ from the tokenizer's.

    Returns:
        token_ids [L] and labels [L], int64, unshifted; labels are -100 where there is no target.

    Raises:
        ConversationError: (a ``ValueError``) if a turn is malformed, there are fewer tags than images, the length limit
            cuts an image, or, with ``strict``, for the cases above; ``error.reason`` names it.
    """
    checked = checked_turns(turns, len(image_tokens), strict)
    ids, labels = tokenize(template_of(tokenizer).pieces(checked), tokenizer, image_tokens, image_ids)
    if max_length is not None and len(ids) > max_length:
        ids, labels = cut(ids, labels, max_length, sum(image_tokens), (image_ids or image_token_ids(tokenizer))[0])
        if strict and not (labels != IGNORED).any():
            raise ConversationError(
                f"the limit of {max_length} tokens cuts the answer away, no target is left", "too_long"
            )
    return torch.from_numpy(ids), torch.from_numpy(labels)


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[int] = (),
    *,
    image_ids: tuple[int, int, int] | None = None,
) -> Tensor:
    """Token ids of a conversation that waits for its next answer: they end with the assistant's header.

    Args:
        turns: as in :func:`encode_conversation`; earlier answers are history, the last turn is the question.
        tokenizer: from :func:`load_tokenizer`.
        image_tokens: number of visual tokens of each image.
        image_ids: as in :func:`encode_conversation`.

    Returns:
        token_ids [L] int64.

    Raises:
        ConversationError: (a ``ValueError``) if a turn is malformed or of an unknown role, the last turn is not a
            question, or the number of ``<image>`` tags is not the number of images.
    """
    known = known_turns(turns, strict=True)
    if not known or known[-1][0] != "human":
        raise ConversationError("the last turn of a prompt must be from 'human'")
    pieces = template_of(tokenizer).prompt(with_images(known, len(image_tokens), strict=True))
    return torch.from_numpy(tokenize(pieces, tokenizer, image_tokens, image_ids)[0])


def load_tokenizer(folder_or_hub_id: str, chat_template: str = "auto") -> PreTrainedTokenizerBase:
    """A tokenizer that knows ``<IMG_CONTEXT>``, ``<img>`` and ``</img>``; missing ones are added in this order.

    Args:
        folder_or_hub_id: where it lies.
        chat_template: ``auto``: its own; ChatML if it has none, or if it lies beside a released NEO model, as those are
            trained in ChatML, whatever template their tokenizer has. ``chatml``: plain ChatML. A path that ends with
            ``.jinja``: the template in that file. The choice goes with the tokenizer when it is saved.

    Raises:
        FileNotFoundError: if there is no tokenizer, or no such template.
        ValueError: if answers cannot be found in what the template writes.
    """
    from transformers import AddedToken, AutoTokenizer
    from transformers.utils import logging as notes

    verbosity = notes.get_verbosity()
    notes.set_verbosity_error()  # it warns of every config.json of a model that it does not know
    try:
        folder = resolve(folder_or_hub_id, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"no tokenizer at {str(folder_or_hub_id)!r}; give a folder that holds tokenizer.json or a hub id ({reason})"
        ) from None
    finally:
        notes.set_verbosity(verbosity)
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in IMAGE_TOKENS if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=True) for token in missing], special_tokens=True)
    tokenizer.chat_template = _choose_template(tokenizer, folder, chat_template)
    absent = [token for token in (TURN_START, TURN_END) if token not in vocabulary]
    if template_of(tokenizer).plain and absent:
        logger.warning(
            "the tokenizer at %s has no %s; it is spelt in ordinary tokens", folder_or_hub_id, " or ".join(absent)
        )
    return tokenizer


def _choose_template(tokenizer: PreTrainedTokenizerBase, folder: Path, choice: str) -> Any:
    """The text of the chat template that :func:`load_tokenizer` was asked for."""
    if choice.endswith(".jinja"):
        if not Path(choice).is_file():
            raise FileNotFoundError(f"there is no chat template {choice!r}; give auto, chatml or a .jinja file")
        return Path(choice).read_text(encoding="utf-8")
    if choice not in ("auto", "chatml"):
        raise ValueError(f"chat_template must be auto, chatml or a path that ends with .jinja, got {choice!r}")
    released = _is_released(folder)
    if choice == "auto" and tokenizer.chat_template is not None and not released:
        return tokenizer.chat_template
    # Models whose tokenizer begins every text with a token do badly without it, and ChatML does not write it.
    begins = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] or getattr(tokenizer, "add_bos_token", False)
    return "{{ bos_token }}" + CHATML if begins and tokenizer.bos_token else CHATML


def _is_released(folder: Path) -> bool:
    """Whether a folder holds a model in the released NEO layout."""
    config = folder / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError:
        return False  # reading the model reports that its config is damaged
    return isinstance(found, dict) and found.get("model_type") == "neo_chat"
