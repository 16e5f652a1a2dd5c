"""`tiktoken.model` in the `tiktoken` library.

The tokenizers library could hold the same merges, but its regular expressions (Oniguruma) are of another Unicode
version than tiktoken's: thousands of characters are letters for one and not for the other, and would be split otherwise
than by the model's own code, which calls tiktoken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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
        self._encoding = guarded(
            lambda: Encoding(
                "tiktoken.model", pat_str=files.family.pattern, mergeable_ranks=dict(files.ranks), special_tokens={}
            ),
            "tiktoken.model: cannot be read as a tokenizer",
        )
        self._ids = {token.text: token.id for token in files.special}
        # Of two tokens of which one begins the other, the longer is meant.
        texts = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, texts))})" if texts else r"(?!)")
        self._bytes = {rank: token for token, rank in files.ranks.items()}
        self._bytes |= {token.id: token.text.encode() for token in files.special if not token.hidden}
        self.special_ids = {token.text: token.id for token in files.special if token.hidden}
        self.vocab_size = len(files.ranks) + len(files.special)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def encode(self, text: str, special: bool) -> list[int]:
        def ids() -> Iterator[int]:
            text.encode()  # tiktoken would replace a lone surrogate
            for index, part in enumerate(self._special.split(text)):
                if index % 2:
                    yield self._ids[part]
                else:
                    for piece in self._pieces(part):
                        yield from self._encoding.encode_ordinary(piece)

        return guarded(lambda: list(ids()), "the tokenizer fails to encode")

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(id, b"") for id in ids).decode("utf-8", "replace")

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
