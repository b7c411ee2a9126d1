"""Text for language models: WordNet's definitions as prose and as questions, and conversations in ChatML.

WordNet 3.0 (Fellbaum 1998; Princeton University, with a permissive license), Debian package ``wordnet-base``: 117,659
groups of synonyms, each with a definition and often examples. The manual page ``wndb(5WN)`` describes the format.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from neo_components.data.text.templates import TURN_END, TURN_START

PACKAGE = "wordnet-base"
KINDS = ("noun", "verb", "adj", "adv")
_MARK = re.compile(r"\((?:a|p|ip)\)$")
"""Where an adjective stands, behind the word."""


@dataclass(frozen=True)
class Entry:
    """A group of synonyms.

    Args:
        words: the synonyms, spaces written as spaces.
        definition: what they mean.
        examples: sentences or phrases with one of them.
    """

    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]


def read_word_net(folder: Path) -> Iterator[Entry]:
    """The entries of all kinds of words, in the order of the files.

    Args:
        folder: with ``data.noun``, ``data.verb``, ``data.adj`` and ``data.adv``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a line is malformed.
    """
    for kind in KINDS:
        with (folder / f"data.{kind}").open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.startswith("  "):  # the license
                    continue
                try:
                    yield _entry(line)
                except (ValueError, IndexError) as error:
                    raise ValueError(f"{folder}/data.{kind}, line {number} is malformed: {error}") from None


def _entry(line: str) -> Entry:
    """Offset, file, kind, number of words (hexadecimal), a word and its number each, pointers; ``|`` and the gloss."""
    before, _, gloss = line.partition(" | ")
    fields = before.split()
    words = [_MARK.sub("", fields[4 + 2 * index]).replace("_", " ") for index in range(int(fields[3], 16))]
    parts = [part.strip() for part in gloss.strip().split(";")]
    definition = "; ".join(part for part in parts if part and not part.startswith('"'))
    examples = tuple(part.strip('" ') for part in parts if part.startswith('"') and len(part) > 2)
    if not definition:
        raise ValueError("it has no definition")
    return Entry(tuple(words), definition, examples)


def as_text(entry: Entry, rng: random.Random) -> str:
    """The entry as prose, or as a conversation in ChatML."""
    word = rng.choice(entry.words)
    form = rng.randrange(3)
    if form == 0:
        examples = "".join(f" {example[0].upper()}{example[1:]}." for example in entry.examples)
        return f"{', '.join(entry.words)}: {entry.definition}.{examples}\n"
    if form == 1 and entry.examples:
        example = rng.choice(entry.examples)
        return _chat(f"use the word {word} in a sentence.", example)
    asked = rng.choice((f"what does {word} mean?", f"what is {word}?", f"explain {word}.", f"define: {word}"))
    if rng.random() < 0.3:
        return _chat(f"which word means: {entry.definition}?", word)
    return _chat(asked, entry.definition)


def as_chat(turns: Sequence[Mapping[str, str]]) -> str:
    """A conversation, as shards hold it, in ChatML."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return "".join(f"{TURN_START}{roles[turn['from']]}\n{turn['value']}{TURN_END}\n" for turn in turns)


def _chat(question: str, answer: str) -> str:
    return as_chat([{"from": "human", "value": question}, {"from": "gpt", "value": answer}])
