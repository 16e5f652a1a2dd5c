"""`tiktoken.model` in the `tiktoken` library.

The tokenizers library could hold the same merges, but its regular expressions (Oniguruma) are of another Unicode
version than tiktoken's: thousands of characters are letters for one and not for the other, and would be split otherwise
than by the model's own code, which calls tiktoken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from tiktoken import Encoding

from .codec import guarded
from .tiktoken_files import TiktokenFiles

# As `str.isspace` has it, by which the models' own code tells runs apart.
_RUN: Final = re.compile(r"\s+|\S+")


class TiktokenCodec:
    """A vocabulary of byte strings by rank. Raises GenerationError where the library refuses it."""

    def __init__(self, files: TiktokenFiles):
        self._family = files.family
        self.sorts_tools = files.family.sorts_tools
        self._encoding = guarded(
            lambda: Encoding(
                "tiktoken.model", pat_str=files.family.pattern, mergeable_ranks=dict(files.ranks), special_tokens={}
            ),
            "tiktoken.model: cannot be read as a tokenizer",
        )
        self._ids = {token.text: token.id for token in files.special}
        self._special = _SpecialTokens(self._ids)
        self._bytes = {rank: token for token, rank in files.ranks.items()}
        self._bytes |= {token.id: token.text.encode() for token in files.special if not token.hidden}
        self.special_ids = {token.text: token.id for token in files.special if token.hidden}
        self._hidden = {id: text.encode() for text, id in self.special_ids.items()}
        self.vocab_size = len(files.ranks) + len(files.special)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str, special: bool) -> list[int]:
        def ids() -> Iterator[int]:
            text.encode()  # tiktoken would replace a lone surrogate
            for ordinary, special_id in self._special.split(text):
                for piece in self._pieces(ordinary):
                    yield from self._encoding.encode_ordinary(piece)
                if special_id is not None:
                    yield special_id

        return guarded(lambda: list(ids()), "the tokenizer fails to encode")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(id, b"") for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        return self._bytes.get(id) or self._hidden.get(id, b"")

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a text where the models' own code does. tiktoken panics on a million spaces."""
        most, run = self._family.most_characters, self._family.most_run
        for start in range(0, len(text), most):
            chunk, begin = text[start : start + most], 0
            for found in _RUN.finditer(chunk) if len(chunk) > run else ():
                for cut in range(found.start() + run, found.end(), run):
                    yield chunk[begin:cut]
                    begin = cut
            yield chunk[begin:]


class _SpecialTokens:
    """Finds special tokens in a text, from left to right; of several at one place the longest.

    One regular expression of all tokens would try hundreds of them at every `<`.
    """

    def __init__(self, ids: Mapping[str, int]):
        self._ids = ids
        self._lengths = sorted({len(text) for text in ids}, reverse=True)
        self._shortest = self._lengths[-1] if ids else 0
        self._prefixes = {text[: self._shortest] for text in ids}
        first = "".join(sorted({text[0] for text in ids}))
        self._first = re.compile(f"[{re.escape(first)}]" if ids else "(?!)")

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Ordinary text, and the id of the special token after it; None after the last text."""
        begin = 0
        for found in self._first.finditer(text):
            place = found.start()
            if place < begin or text[place : place + self._shortest] not in self._prefixes:
                continue
            for length in self._lengths:
                special_id = self._ids.get(text[place : place + length])
                if special_id is not None:
                    yield text[begin:place], special_id
                    begin = place + length
                    break
        yield text[begin:], None
