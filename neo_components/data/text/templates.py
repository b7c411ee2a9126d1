"""How a tokenizer's chat template writes a conversation: the text in pieces, cut where answers begin and end.

The answers are located by writing the conversation twice, once with marks in place of the answers. What lies between
the marks must be in the real text too, with each answer between, complete or without its outer whitespace. Anything
that does not match is an error: an answer at an unknown position would be supervised wrongly, or not at all.

Source of the form: Jinja templates of Hugging Face tokenizers (https://huggingface.co/docs/transformers/chat_templating).
"""

from __future__ import annotations

import datetime
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from neo_components.data.text.turns import ROLES, CheckedTurn, ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The plain form, which NEO is trained in; used where a tokenizer has no template."""

TODAY = datetime.datetime(2024, 7, 26)
"""The day in templates that write one, so that a run is the same tomorrow. It is the default of Llama 3's template."""

KEPT_PIECES, KEPT_LENGTH = 4096, 256
"""Pieces of at most so many characters whose token ids are remembered: questions and headers come again and again."""

_HEADER = {role: f"{TURN_START}{name}\n" for role, name in ROLES.items()}
_FOOTER = f"{TURN_END}\n"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass
class Piece:
    """A stretch of the text that the model reads.

    Args:
        text: the characters.
        target: whether it is a supervised answer, with what ends it.
    """

    text: str
    target: bool = False


class Template:
    """What one tokenizer makes of conversations; from :func:`template_of`.

    Args:
        tokenizer: with a chat template, or without one: then plain ChatML.

    Attributes:
        plain: whether it writes plain ChatML, byte for byte. Then the line break behind ``<|im_end|>`` is a target too,
            as in the training of the released models.
        end: the text that ends an answer and is a target with it: an added token of the tokenizer, with what stands
            before it, or ordinary text; empty if the template has none.
        adds_space: whether the tokenizer puts a space before a text.

    Raises:
        ValueError: if the template cannot write a question and an answer so that the answer is found again.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.text: str = tokenizer.get_chat_template() if tokenizer.chat_template is not None else CHATML
        self.special = tokenizer.special_tokens_map
        self.has_blocks = _GENERATION.search(self.text) is not None
        added = sorted((token for token in tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
        self.added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self.adds_space = "".join(tokenizer.tokenize("x")).startswith(("▁", "Ġ"))
        self.checked: set[tuple[str, ...]] = set()
        self._known: dict[str, list[int]] = {}
        self.plain = self.text == CHATML or self._writes_chatml()
        self.end = _FOOTER if self.plain else self._find_end()

    def pieces(self, turns: Sequence[CheckedTurn]) -> list[Piece]:
        """The text of a conversation: what is read and each answer in turn, what is read last.

        Raises:
            ConversationError: if the template refuses the turns, leaves one out, or changes an answer.
        """
        if self.plain:
            return _chatml(turns)
        if not turns:
            return [Piece("")]
        self._check_roles(tuple(role for role, _, _ in turns))
        text, spans = self._spans(turns)
        pieces, position = [], 0
        answers = [target for role, _, target in turns if role == "gpt"]
        for (start, end), target in zip(spans, answers, strict=True):
            pieces += [Piece(text[position:start]), Piece(text[start:end], target)]
            position = end
        return [*pieces, Piece(text[position:])]

    def prompt(self, turns: Sequence[CheckedTurn]) -> list[Piece]:
        """The same, up to where the next answer begins: what training shows before that answer.

        Raises:
            ConversationError: as in :meth:`pieces`.
        """
        return self.pieces([*turns, ("gpt", _mark(turns, 0), False)])[:-2]

    def encode(self, piece: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Token ids of a piece alone; they are cached, so callers must not change them."""
        ids = self._known.get(piece)
        if ids is None:
            ids = tokenizer.encode(piece, add_special_tokens=False)
            if len(piece) <= KEPT_LENGTH:
                if len(self._known) >= KEPT_PIECES:
                    self._known.clear()
                self._known[piece] = ids
        return ids

    def _render(self, turns: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the ranges of its ``{% generation %}`` blocks."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = [{"role": ROLES[role], "content": text} for role, text in turns]
        words: dict[str, Any] = self.special | {"strftime_now": TODAY.strftime}
        render: Any = render_jinja_template  # its annotation promises less than it returns
        try:
            [text], blocks = render(
                [messages], chat_template=self.text, return_assistant_tokens_mask=self.has_blocks, **words
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = ", ".join(ROLES[role] for role, _ in turns)
            raise ConversationError(
                f"the tokenizer's chat template refuses the turns {roles}: {error}; write the conversation as it wants "
                "it (a system text can stand in the first user turn), or use chat_template='chatml'",
                "template",
            ) from error
        return text, blocks[0] if blocks else []

    def _spans(self, turns: Sequence[CheckedTurn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the range of each answer that is a target."""
        text, answers, blocks = self._answers(turns)
        if blocks and len(blocks) != len(answers):
            raise _changed(f"has {len(blocks)} generation blocks for {len(answers)} answers")
        spans = []
        for number, (start, end) in enumerate(answers):
            block = blocks[number] if blocks else (start, end)
            if not block[0] <= start <= end <= block[1]:
                raise _changed("has generation blocks that do not hold the answers")
            end += len(self.end) if text.startswith(self.end, end) else 0
            start, end = block[0], max(end, block[1])
            # A space before the answer is the model's to write: tokenizers join it with the first word.
            spans.append((len(text[:start].rstrip(" ")), end))
        return text, spans

    def _answers(self, turns: Sequence[CheckedTurn]) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """The text, where the bare answers stand in it, and the template's own blocks."""
        between = self._between(turns)
        text, blocks = self._render([turn[:2] for turn in turns])
        if not text.startswith(between[0]):
            raise _changed("writes the text before an answer differently for another answer")
        answers: list[tuple[int, int]] = []
        position = len(between[0])
        for value, after in zip([value for role, value, _ in turns if role == "gpt"], between[1:], strict=True):
            length = _length(text, position, value, after, last=len(answers) + 2 == len(between))
            if length is None:
                raise _changed(f"does not write the answer {value!r:.60} as it is")
            answers.append((position, position + length))
            position += length + len(after)
        return text, answers, blocks

    def _between(self, turns: Sequence[CheckedTurn]) -> list[str]:
        """The texts before, between and behind the answers, found by marks in place of the answers."""
        marked: list[tuple[str, str]] = []
        marks: list[str] = []
        for role, value, _ in turns:
            if role == "gpt":
                marks.append(value := _mark(turns, len(marks)))
            marked.append((role, value))
        text, _ = self._render(marked)
        between, position = [], 0
        for mark in marks:
            start = text.find(mark, position)
            if start < 0 or text.count(mark) > 1:
                raise _changed("leaves an answer out, writes it twice or in another order")
            between.append(text[position:start])
            position = start + len(mark)
        return [*between, text[position:]]

    def _check_roles(self, roles: tuple[str, ...]) -> None:
        """That the template writes each turn of such a conversation, once and in order."""
        if roles in self.checked:
            return
        turns: list[CheckedTurn] = [(role, f"turn{number}zq", False) for number, role in enumerate(roles)]
        text, _ = self._render([(role, value) for role, value, _ in turns])
        positions = [text.find(value) for _, value, _ in turns]
        for (role, value, _), position in zip(turns, positions, strict=True):
            if position < 0 or text.count(value) > 1:
                raise _changed(f"leaves out the {ROLES[role]} turn, or writes it twice")
        if positions != sorted(positions):
            raise _changed("writes the turns in another order")
        self.checked.add(roles)

    def _writes_chatml(self) -> bool:
        """Whether three conversations, with whitespace around their texts, come out as plain ChatML."""
        for roles in (("human", "gpt"), ("system", "human", "gpt"), ("human", "gpt") * 2):
            turns: list[CheckedTurn] = [(role, f" {number}\n", False) for number, role in enumerate(roles)]
            try:
                text, blocks = self._render([(role, value) for role, value, _ in turns])
            except ConversationError:
                return False
            if blocks or text != "".join(piece.text for piece in _chatml(turns)):
                return False
        return True

    def _find_end(self) -> str:
        """What stands behind an answer in the middle as well as behind the last one, up to the first added token."""
        turns: list[CheckedTurn] = [("human", "one", False), ("gpt", "two", False)]
        try:
            text, [(_, end)], _ = self._answers(turns)
        except ConversationError as error:
            raise ValueError(f"{error} (that is about a question and its answer)") from error
        common = text[end:]
        try:
            text, [(_, end), _], _ = self._answers(turns * 2)
            common = _common(common, text[end:])
        except ConversationError as error:
            logger.debug("a chat template for one answer only: %s", error)
        token = self.added.search(common)
        if token and not common[: token.start()].strip():
            return common[: token.end()]
        if not common.strip():
            logger.warning("the chat template ends answers by no token: a model trained with it does not learn to stop")
        return common.rstrip()


_TEMPLATES: WeakKeyDictionary[Any, tuple[tuple[Any, int], Template]] = WeakKeyDictionary()


def template_of(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of a tokenizer, looked into once.

    Raises:
        ValueError: if answers cannot be found in what it writes.
    """
    state = (tokenizer.chat_template, len(tokenizer))
    known = _TEMPLATES.get(tokenizer)
    if known is None or known[0] != state:
        known = _TEMPLATES[tokenizer] = (state, Template(tokenizer))
    return known[1]


def _chatml(turns: Sequence[CheckedTurn]) -> list[Piece]:
    """Plain ChatML; an answer's piece ends with ``<|im_end|>`` and a line break."""
    pieces = [Piece("")]
    for role, text, target in turns:
        pieces[-1].text += _HEADER[role]
        if role == "gpt":
            pieces += [Piece(text + _FOOTER, target), Piece("")]
        else:
            pieces[-1].text += text + _FOOTER
    return pieces


def _mark(turns: Sequence[CheckedTurn], number: int) -> str:
    """A word that none of the turns holds."""
    mark, tail = f"answer{number}", "zq"
    while any(mark + tail in value for _, value, _ in turns):
        tail += "zq"
    return mark + tail


def _length(text: str, position: int, answer: str, after: str, last: bool) -> int | None:
    """Length of an answer in the text, if one of its forms stands at that position with the right text behind it."""
    begins = {answer: None, answer.lstrip("\n"): None, answer.lstrip(): None}
    for written in [form for begin in begins for form in (begin, begin.rstrip("\n"), begin.rstrip())]:
        end = position + len(written)
        fits = text.startswith(written, position) and text.startswith(after, end)
        if fits and (not last or end + len(after) == len(text)):
            return len(written)
    return None


def _common(one: str, other: str) -> str:
    """What both texts begin with."""
    differ = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differ, min(len(one), len(other)))]


def _changed(what: str) -> ConversationError:
    return ConversationError(
        f"the tokenizer's chat template {what}, so its targets cannot be located; use chat_template='chatml'",
        "template",
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's end of text, and what its chat template ends an answer with
    (``<|im_end|>`` in ChatML), as far as they are tokens of it."""
    end: Any = tokenizer.convert_tokens_to_ids(template_of(tokenizer).end.strip())
    return sorted({tokenizer.eos_token_id, end} - {None, tokenizer.unk_token_id})
