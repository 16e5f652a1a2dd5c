"""The bytes that a token of a `tokenizer.json` stands for, from its decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from tokenizers import Tokenizer as FastTokenizer

_BYTE: Final = re.compile("<0x([0-9A-F]{2})>")


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 are themselves, others the characters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class TokenBytes:
    """Bytes by token id. A token's text may be part of a character, which only its bytes can say."""

    def __init__(self, tokenizer: FastTokenizer):
        self._tokenizer = tokenizer
        self._added = {id: token.content for id, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        kinds = set() if decoder is None else set(_kinds(json.loads(decoder.__getstate__())))
        self._alphabet = _byte_of_character() if "ByteLevel" in kinds else {}
        self._falls_back = "ByteFallback" in kinds
        self._space = "\N{LOWER ONE EIGHTH BLOCK}" if kinds & {"Metaspace", "Replace"} else None

    def of(self, id: int) -> bytes:
        """Bytes of a token; empty for an id that the tokenizer does not have."""
        added = self._added.get(id)
        token = self._tokenizer.id_to_token(id) if added is None else added
        if token is None:
            return b""
        if added is not None:
            return token.encode("utf-8", "replace")
        if self._alphabet and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        byte = _BYTE.fullmatch(token) if self._falls_back else None
        if byte is not None:
            return bytes([int(byte[1], 16)])
        return (token if self._space is None else token.replace(self._space, " ")).encode("utf-8", "replace")


def _kinds(decoder: Any) -> Iterator[str]:
    """The types of a decoder and of those that it is made of."""
    if isinstance(decoder, dict):
        yield str(decoder.get("type"))
        for part in decoder.get("decoders") or ():
            yield from _kinds(part)
