"""The bytes of tokens: together they are the text, also where one token is part of a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from npuq.runtime import Tokenizer
from npuq.runtime.text.token_bytes import TokenBytes

TEXTS = ["Call me Ishmael.", "naïve café \N{SPOUTING WHALE}\N{SPOUTING WHALE} 鯨\u200d\n\t\x00ÿĀ", "  two  spaces "]


@pytest.mark.parametrize("text", TEXTS)
def test_the_examples_bytes(example_fp8: Path, text: str) -> None:
    tokenizer = Tokenizer(example_fp8)
    ids = tokenizer.encode(text, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    assert any(len(tokenizer.token_bytes(id)) == 1 for id in ids) or text == TEXTS[0]


def test_special_and_unknown_tokens(example_fp8: Path) -> None:
    tokenizer = Tokenizer(example_fp8)
    for text, id in tokenizer.special_ids.items():
        assert tokenizer.token_bytes(id) == text.encode()
    for unknown in (4096, 10**9):
        assert tokenizer.token_bytes(unknown) == b""


@pytest.mark.parametrize("text", TEXTS)
def test_tiktokens_bytes(kimi_files: Path, text: str) -> None:
    tokenizer = Tokenizer(kimi_files)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, special=False))) == text.encode()
    for special, id in tokenizer.special_ids.items():
        assert tokenizer.token_bytes(id) == special.encode()


def test_sentencepieces_bytes() -> None:
    """As in a Llama tokenizer: spaces are a mark of their own, and unknown characters are bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "▁a": 258}
    fast = FastTokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "a")], byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = "a a鯨 <0x41>"
    found = b"".join(map(TokenBytes(fast).of, fast.encode(text).ids))
    assert found == text.encode()
    assert TokenBytes(FastTokenizer(models.BPE(vocab={"▁a": 0}, merges=[]))).of(0) == "▁a".encode()
