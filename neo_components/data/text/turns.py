"""Checks the turns of a conversation in LLaVA form and puts its images in place; needs no tokenizer and no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from neo_components.data.skip_counts import SampleError

ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
"""Roles of turns, in LLaVA's words and in those of chat templates."""

IMAGE_TAG = "<image>"
IMAGE_TOKEN, IMAGE_START, IMAGE_END = IMAGE_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>")

Turn = Mapping[str, Any]
"""``{"from": "human" | "gpt" | "system", "value": str}``; an answer with ``"is_input": true`` is no target."""

CheckedTurn = tuple[str, str, bool]
"""One turn: role (``system``, ``human``, ``gpt``), text, whether it is a target."""

_RESERVED = re.compile("|".join(map(re.escape, IMAGE_TOKENS)))


class ConversationError(SampleError):
    """A conversation that cannot be used.

    Args:
        message: what is wrong and what to do.
        reason: one word for counting: ``turns``, ``role``, ``image_tags``, ``reserved``, ``no_answer``, ``template`` or
            ``too_long``.
    """

    def __init__(self, message: str, reason: str = "turns") -> None:
        super().__init__(message, reason)


def check_conversation(turns: Sequence[Turn], images: int) -> None:
    """Checks what a strict :func:`~neo_components.data.text.conversation.encode_conversation` checks.

    Args:
        turns: the conversation.
        images: number of its images; the frames of a video count as one.

    Raises:
        ConversationError: (a ``ValueError``) if the conversation has nothing to train on.
    """
    checked_turns(turns, images, strict=True)


def checked_turns(turns: Sequence[Turn], images: int, strict: bool) -> list[CheckedTurn]:
    """The turns of a training conversation, checked, with their images in place.

    Raises:
        ConversationError: (a ``ValueError``) if a turn is malformed, there are too few tags or, if ``strict``, for
            everything that :func:`check_conversation` refuses.
    """
    checked = with_images(known_turns(turns, strict), images, strict)
    if strict and not any(target and text.strip() for _, text, target in checked):
        raise ConversationError("the conversation has no answer to train on: add a 'gpt' turn with text", "no_answer")
    return checked


def known_turns(turns: Sequence[Turn], strict: bool) -> list[CheckedTurn]:
    """The turns with a known role; an empty system turn is left out.

    Raises:
        ConversationError: (a ``ValueError``) if a turn is malformed or, if ``strict``, of an unknown role.
    """
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


def with_images(turns: list[CheckedTurn], images: int, strict: bool) -> list[CheckedTurn]:
    """The turns with each image's tag replaced by a single visual token between its boundary tokens.

    Raises:
        ConversationError: (a ``ValueError``) if tags and images do not match, or the text holds a reserved token.
    """
    turns = _with_tag(turns, images)
    tags = sum(text.count(IMAGE_TAG) for _, text, _ in turns)
    if tags < images or (strict and tags > images):
        raise ConversationError(
            f"{tags} {IMAGE_TAG} tags for {images} images; write one tag for each image", "image_tags"
        )
    placed = []
    for role, text, target in turns:
        # A visual token that belongs to no image would take another image's pixels; the other two merely mislead.
        if IMAGE_TOKEN in text or (strict and _RESERVED.search(text)):
            raise ConversationError(f"the text holds one of the reserved {', '.join(IMAGE_TOKENS)}", "reserved")
        count = min(images, text.count(IMAGE_TAG))
        placed.append((role, text.replace(IMAGE_TAG, IMAGE_START + IMAGE_TOKEN + IMAGE_END, count), target))
        images -= count
    return placed


def _with_tag(turns: list[CheckedTurn], images: int) -> list[CheckedTurn]:
    """Puts the tag of a single image in front of the first human turn if there is no tag at all."""
    first = next((i for i, turn in enumerate(turns) if turn[0] == "human"), None)
    if images != 1 or first is None or any(IMAGE_TAG in text for _, text, _ in turns):
        return turns
    role, text, target = turns[first]
    return [*turns[:first], (role, f"{IMAGE_TAG}\n{text}", target), *turns[first + 1 :]]
