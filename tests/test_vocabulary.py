"""Tokens of byte-level BPE and of sentencepiece's kind, compared as they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from neo_components.model.vocabulary import token_strings
from neo_components.quickstart.text_llm import train_tokenizer

TEXTS = ["the colour of the café is déjà vu, naïve", "图片 里 有 什么 图片", "A ▁ in the text: Ġ"] * 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vocabulary")
    for pieces in ("bytes", "spaces"):
        train_tokenizer(TEXTS, 420, pieces).save_pretrained(root / pieces)
    return {pieces: root / pieces for pieces in ("bytes", "spaces")}


def test_what_both_know_reads_the_same(folders: dict[str, Path]) -> None:
    ours, theirs = (token_strings(folders[name]) for name in ("bytes", "spaces"))
    shared = set(ours) & set(theirs)
    for text in (" the", "é", "图片", " colour", "A", "\n", "<|im_end|>"):
        assert text in ours, text
    for text in (" the", "é", "图片", " colour", "A", "<|im_end|>", "<0xC3>", "<0xA9>"):
        assert text in shared, text
    assert not [text for text in ours if "Ã" in text]
    # Every byte is known to both, alone or as the character that it is.
    assert {f"<0x{byte:02X}>" for byte in range(0x80, 0x100)} <= shared


@pytest.mark.parametrize("pieces", ["bytes", "spaces"])
def test_a_text_is_made_of_the_tokens_that_read_so(folders: dict[str, Path], pieces: str) -> None:
    """Told by the tokenizer itself: what it cuts a text into reads as that text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders[pieces])
    reads = {row: text for text, row in token_strings(folders[pieces]).items()}
    for text in ("the café", "déjà vu", "图片", " ▁ Ġ", "Ω"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(as_bytes(reads[row]) for row in ids) == text.replace(*blank(pieces)).encode(), text


def blank(pieces: str) -> tuple[str, str]:
    """Sentencepiece writes a blank as U+2581, and so loses that character of a text: it comes back as a blank."""
    return ("▁", " ") if pieces == "spaces" else ("▁", "▁")


def as_bytes(text: str) -> bytes:
    return bytes([int(text[3:5], 16)]) if text.startswith("<0x") else text.encode()


def test_a_piece_goes_before_the_byte_of_the_same_text(folders: dict[str, Path]) -> None:
    """Sentencepiece has ``A`` twice, as a piece that is used and as a byte that never is."""
    from transformers import AutoTokenizer

    strings = token_strings(folders["spaces"])
    tokenizer = AutoTokenizer.from_pretrained(folders["spaces"])
    vocabulary = tokenizer.get_vocab()
    assert vocabulary["<0x41>"] < vocabulary["A"] == strings["A"]
    assert strings["Z"] == vocabulary["<0x5A>"]  # no text had it, so the byte is all there is
    assert list(strings.values()) == sorted(strings.values())


def test_an_unknown_kind_of_pieces() -> None:
    with pytest.raises(ValueError, match="pieces must be one of bytes, spaces, got 'words'"):
        train_tokenizer(TEXTS, 420, "words")
