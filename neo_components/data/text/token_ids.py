"""From the pieces of a text to token ids and labels, images widened to their visual tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from neo_components.data.text.templates import Piece, template_of
from neo_components.data.text.turns import IMAGE_TOKENS, ConversationError
from neo_components.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def image_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int, int]:
    """The tokenizer's ids of the visual token, ``<img>`` and ``</img>``.

    Raises:
        ValueError: if it lacks one of them.
    """
    context, start, end = cast(list[int], tokenizer.convert_tokens_to_ids(list(IMAGE_TOKENS)))
    if len({context, start, end} - {None, tokenizer.unk_token_id}) < 3:
        raise ValueError(f"the tokenizer lacks some of {', '.join(IMAGE_TOKENS)}; load it with load_tokenizer")
    return context, start, end


def tokenize(
    pieces: Sequence[Piece],
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[int],
    image_ids: tuple[int, int, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and labels [L] int64.

    Args:
        pieces: the text; each image is one visual token in it.
        tokenizer: from ``load_tokenizer``.
        image_tokens: number of visual tokens of each image.
        image_ids: the model's own ids of the image tokens, if they differ from the tokenizer's.

    Raises:
        ValueError: if an image has no visual token, or the model's ids are those of other tokens.
        ConversationError: if the text has not one visual token for each image.
    """
    encoded = list(piece_ids([piece.text for piece in pieces], tokenizer))
    ids = np.array([i for part in encoded for i in part], np.int64)
    target = np.repeat([piece.target for piece in pieces], [len(part) for part in encoded])
    if image_tokens:
        if min(image_tokens) < 1:
            raise ValueError(f"each image needs at least one visual token, got {list(image_tokens)}")
        own_ids = image_token_ids(tokenizer)
        positions = ids == own_ids[0]
        if positions.sum() != len(image_tokens):
            message = f"the chat template wrote {positions.sum()} of {len(image_tokens)} images"
            raise ConversationError(f"{message}; use chat_template='chatml'", "template")
        repeats = np.ones(len(ids), np.int64)
        repeats[positions] = image_tokens
        ids, target = np.repeat(ids, repeats), np.repeat(target, repeats)
        if image_ids is not None:
            ids = _translate(ids, own_ids, image_ids)
    return ids, np.where(target, ids, IGNORED)


def piece_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of each piece of one text, so that those of the first pieces do not depend on what follows.

    A byte-level tokenizer gives a piece alone the ids that it has behind others. One that puts a space before a text
    does not, so there the text so far is tokenized as a whole, and then with the next piece. Where the two do not
    agree, because a token would reach across the cut, the next piece is tokenized behind a character that stays apart.
    """
    template = template_of(tokenizer)
    text, ids = "", list[int]()
    for piece in texts:
        if not piece:
            yield []
            continue
        if not template.adds_space:
            yield template.encode(piece, tokenizer)
            continue
        text += piece
        whole = tokenizer.encode(text, add_special_tokens=False)
        new = whole[len(ids) :] if whole[: len(ids)] == ids else _behind(piece, tokenizer)
        ids += new
        yield new


def _behind(piece: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text that continues another, so that no space is put before it."""
    for before in "\na0.。":
        head = tokenizer.encode(before, add_special_tokens=False)
        both = tokenizer.encode(before + piece, add_special_tokens=False)
        if both[: len(head)] == head:
            return both[len(head) :]
    raise ConversationError(f"the tokenizer joins {piece!r:.40} with any text before it; strip its spaces", "template")


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


def cut(
    ids: np.ndarray, labels: np.ndarray, length: int, visual_tokens: int, image_token_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``length`` tokens.

    Raises:
        ConversationError: if that cuts an image.
    """
    if length < 1:
        raise ValueError(f"max_length must be at least 1, got {length}")
    if (ids[:length] == image_token_id).sum() < visual_tokens:
        raise ConversationError(f"the limit of {length} tokens cuts an image; raise it or lower max_pixels", "too_long")
    return ids[:length], labels[:length]
