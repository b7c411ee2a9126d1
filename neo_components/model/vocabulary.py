"""The text of the tokens of a vocabulary, to compare different tokenizers.

Byte-level BPE (GPT-2, Qwen, Llama 3) writes every byte as a printable character, so ``é`` is ``Ã©`` and a space ``Ġ``;
sentencepiece (Llama 2, Gemma, InternLM) writes a space as ``▁``, and ``<0xC3>`` for a byte of a character that is
not in its vocabulary. This module decodes both into the text that they represent.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from neo_components.storage.hub import resolve

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_strings(source: str | Path) -> dict[str, int]:
    """The text of each token of a tokenizer -> its id, in order of ids.

    Bytes that are no text alone, because they are a part of a character, read as ``<0xC3>``, and so does the byte 0.
    Where two tokens read the same, the first counts, and one that is a byte's last resort only if there is no other.

    Args:
        source: folder or hub id with a tokenizer.

    Raises:
        FileNotFoundError: if there is no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = resolve(source, weights=False)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"no tokenizer in {folder}; give a folder that holds tokenizer.json ({reason})"
        ) from error
    added = tokenizer.get_added_vocab()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    read = _read_byte_level if _is_byte_level(tokenizer) else _read_piece
    strings: dict[str, int] = {}
    last_resorts: dict[str, int] = {}
    for token, row in tokens:
        text = token if token in added else read(token)
        (last_resorts if read is _read_piece and BYTE.fullmatch(token) else strings).setdefault(text, row)
    return dict(sorted((last_resorts | strings).items(), key=lambda item: item[1]))


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether its tokens are bytes written as characters; a tokenizer without a Rust side is sentencepiece's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"type":"ByteLevel"' in backend.to_str()


def _byte_of_character() -> dict[str, int]:
    """The characters of byte-level BPE -> the bytes that they represent.

    Printable Latin-1 represents itself; the other bytes, in order, are the characters from U+0100 on
    (Radford et al. 2019, the tokenizer of GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _read_byte_level(token: str) -> str:
    if not all(character in _BYTES for character in token):
        return token
    return _decode(bytes(_BYTES[character] for character in token))


def _read_piece(token: str) -> str:
    if byte := BYTE.fullmatch(token):
        return _decode(bytes([int(byte[1], 16)]))
    return token.replace("▁", " ")


def _decode(data: bytes) -> str:
    """UTF-8, with ``<0xC3>`` for bytes of an incomplete character and for byte 0, which separates texts in an asset."""
    text = data.decode("utf-8", "surrogateescape")
    return re.sub(r"[\0\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) % 0xDC00:02X}>", text)
