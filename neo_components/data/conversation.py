"""From a conversation to token ids and labels.

Conversations are in LLaVA form: a list of turns ``{"from": "human" | "gpt" | "system", "value": str}``. Each
``<image>`` in a text stands for one image, in order. They are rendered in ChatML, as NEO and Qwen3 do::

    <|im_start|>user
    <img><IMG_CONTEXT>...</img>
    What is it?<|im_end|>
    <|im_start|>assistant
    An apple.<|im_end|>

What is learnt of a conversation is each answer with its ``<|im_end|>`` and the line break after it; an answer marked
``"is_input": true`` is read, not learnt. The text is tokenised in pieces that are cut where an answer begins and after
its end, in training and at inference alike, so a model is asked exactly what it was taught.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from neo_components.data.tally import SampleError
from neo_components.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IMAGE_TAG = "<image>"
IMAGE_TOKEN, IMAGE_START, IMAGE_END = IMAGE_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
"""Who speaks, in LLaVA's words and in ChatML's."""

Turn = Mapping[str, Any]

_HEADER = {role: f"{TURN_START}{name}\n" for role, name in ROLES.items()}
_FOOTER = f"{TURN_END}\n"
_RESERVED = re.compile("|".join(map(re.escape, IMAGE_TOKENS)))


class ConversationError(SampleError):
    """A conversation that cannot be used.

    Args:
        message: what is wrong and what to do.
        reason: one word for counting: ``turns``, ``role``, ``image_tags``, ``reserved``, ``no_answer`` or ``too_long``.
    """

    def __init__(self, message: str, reason: str = "turns") -> None:
        super().__init__(message, reason)


@dataclass
class _Piece:
    """A stretch of text that is tokenised at once."""

    text: str
    learnt: bool = False


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
        image_ids: the model's own ids of the visual token, ``<img>`` and ``</img>`` (``InputSpec.image_ids``) if they
            differ from the tokenizer's.

    Returns:
        token_ids [L] and labels [L], int64, unshifted; labels are -100 where nothing is learnt.

    Raises:
        ConversationError: (a ``ValueError``) if a turn is malformed, there are fewer tags than images, the length limit
            cuts an image, or, with ``strict``, for the cases above; ``error.reason`` tells which.
    """
    pieces = _answered_pieces(turns, len(image_tokens), strict)
    ids, labels = _tokenise(pieces, tokenizer, image_tokens, image_ids)
    if max_length is not None and len(ids) > max_length:
        ids, labels = _cut(ids, labels, max_length, sum(image_tokens), (image_ids or image_token_ids(tokenizer))[0])
        if strict and not (labels != IGNORED).any():
            raise ConversationError(
                f"the limit of {max_length} tokens cuts the answer away, nothing is left to learn", "too_long"
            )
    return torch.from_numpy(ids), torch.from_numpy(labels)


def check_conversation(turns: Sequence[Turn], images: int) -> None:
    """What a strict :func:`encode_conversation` checks, without a tokenizer.

    Raises:
        ConversationError: (a ``ValueError``) if the conversation with so many images cannot be learnt from.
    """
    _answered_pieces(turns, images, strict=True)


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
    known = _known_turns(turns, strict=True)
    if not known or known[-1][0] != "human":
        raise ConversationError("the last turn of a prompt must be from 'human'")
    pieces = _join(known, len(image_tokens), strict=True)
    pieces[-1].text += _HEADER["gpt"]
    return torch.from_numpy(_tokenise(pieces, tokenizer, image_tokens, image_ids)[0])


def load_tokenizer(folder_or_hub_id: str) -> PreTrainedTokenizerBase:
    """A tokenizer that knows ``<IMG_CONTEXT>``, ``<img>`` and ``</img>``; missing ones are added in this order.

    Raises:
        FileNotFoundError: if there is no tokenizer.
    """
    from transformers import AddedToken, AutoTokenizer
    from transformers.utils import logging as notes

    verbosity = notes.get_verbosity()
    notes.set_verbosity_error()  # it warns of every config.json of a model that it does not know
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_hub_id)
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
    if absent := [token for token in (TURN_START, TURN_END) if token not in vocabulary]:
        logger.warning(
            "the tokenizer at %s has no %s; it is spelt in ordinary tokens", folder_or_hub_id, " or ".join(absent)
        )
    return tokenizer


def image_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The tokenizer's ids of the visual token, ``<img>`` and ``</img>``.

    Raises:
        ValueError: if it lacks one of them.
    """
    context, start, end = cast(list[int], tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)))
    if len({context, start, end} - {None, tokenizer.unk_token_id}) < 3:
        raise ValueError(f"the tokenizer lacks some of {', '.join(IMAGE_TOKENS)}; load it with load_tokenizer")
    return context, start, end


def _known_turns(turns: Sequence[Turn], strict: bool) -> list[tuple[str, str, bool]]:
    """(role, text, is learnt) of each turn with a known role."""
    if isinstance(turns, str | Mapping) or not isinstance(turns, Sequence):
        raise ConversationError(f"a conversation is a list of turns, got {type(turns).__name__}")
    known = []
    for number, turn in enumerate(turns):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(text, str):
            raise ConversationError(f"turn {number} must be {{'from': str, 'value': str}}, got {turn!r:.100}")
        if role in ROLES:
            if role != "system" or text:
                known.append((role, text, role == "gpt" and not turn.get("is_input", False)))
        elif strict:
            raise ConversationError(f"turn {number} is from {role!r}; known are {', '.join(ROLES)}", "role")
    return known


def _answered_pieces(turns: Sequence[Turn], images: int, strict: bool) -> list[_Piece]:
    """The pieces of a conversation to learn from."""
    pieces = _join(_known_turns(turns, strict), images, strict)
    if strict and not any(piece.learnt and piece.text.removesuffix(_FOOTER).strip() for piece in pieces):
        raise ConversationError("the conversation has no answer to learn: add a 'gpt' turn with text", "no_answer")
    return pieces


def _join(turns: list[tuple[str, str, bool]], images: int, strict: bool) -> list[_Piece]:
    """The pieces of a conversation, each image a single visual token between its boundary tokens."""
    turns = _place_images(turns, images)
    tags = sum(text.count(IMAGE_TAG) for _, text, _ in turns)
    if tags < images or (strict and tags > images):
        raise ConversationError(
            f"{tags} {IMAGE_TAG} tags for {images} images; write one tag for each image", "image_tags"
        )
    pieces = [_Piece("")]
    for role, text, learnt in turns:
        # A visual token that belongs to no image would take another image's place; the other two merely mislead.
        if IMAGE_TOKEN in text or (strict and _RESERVED.search(text)):
            raise ConversationError(f"the text holds one of the reserved {', '.join(IMAGE_TOKENS)}", "reserved")
        count = min(images, text.count(IMAGE_TAG))
        text = text.replace(IMAGE_TAG, IMAGE_START + IMAGE_TOKEN + IMAGE_END, count)
        images -= count
        pieces[-1].text += _HEADER[role]
        if role == "gpt":
            pieces += [_Piece(text + _FOOTER, learnt), _Piece("")]
        else:
            pieces[-1].text += text + _FOOTER
    return pieces


def _place_images(turns: list[tuple[str, str, bool]], images: int) -> list[tuple[str, str, bool]]:
    """Puts the tag of a single image in front of the first human turn if there is none at all."""
    first = next((i for i, turn in enumerate(turns) if turn[0] == "human"), None)
    if images != 1 or first is None or any(IMAGE_TAG in text for _, text, _ in turns):
        return turns
    role, text, learnt = turns[first]
    return [*turns[:first], (role, f"{IMAGE_TAG}\n{text}", learnt), *turns[first + 1 :]]


def _tokenise(
    pieces: list[_Piece],
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[int],
    image_ids: tuple[int, int, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels [L] int64, each image widened to its number of visual tokens."""
    encoded = [tokenizer.encode(piece.text, add_special_tokens=False) if piece.text else [] for piece in pieces]
    ids = np.array([i for part in encoded for i in part], np.int64)
    learnt = np.repeat([piece.learnt for piece in pieces], [len(part) for part in encoded])
    if image_tokens:
        if min(image_tokens) < 1:
            raise ValueError(f"each image needs at least one visual token, got {list(image_tokens)}")
        own_ids = image_token_ids(tokenizer)
        repeats = np.ones(len(ids), np.int64)
        repeats[ids == own_ids[0]] = image_tokens
        ids, learnt = np.repeat(ids, repeats), np.repeat(learnt, repeats)
        if image_ids is not None:
            ids = _translate(ids, own_ids, image_ids)
    return ids, np.where(learnt, ids, IGNORED)


def _translate(ids: np.ndarray, old: tuple[int, int, int], new: tuple[int, int, int]) -> np.ndarray:
    """Replaces the tokenizer's three image ids by the model's."""
    if old == new:
        return ids
    found = [ids == i for i in old]
    if clash := sorted(set(new) & set(ids[~np.any(found, axis=0)].tolist())):
        raise ValueError(
            f"the model's image tokens {new} use ids {clash} that the tokenizer gives to text; "
            f"the tokenizer's image tokens are {old}"
        )
    return np.select(found, new, ids)


def _cut(
    ids: np.ndarray, labels: np.ndarray, length: int, visual_tokens: int, image_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    if length < 1:
        raise ValueError(f"max_length must be at least 1, got {length}")
    if (ids[:length] == image_token_id).sum() < visual_tokens:
        raise ConversationError(f"the limit of {length} tokens cuts an image; raise it or lower max_pixels", "too_long")
    return ids[:length], labels[:length]
