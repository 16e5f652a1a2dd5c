"""Markers in generated tokens: by token id where a marker is one token of the tokenizer, else by its text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..detokenizing import Detokenizer, overlap
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """A text, and the numbers of the generated tokens that it begins with. The rest of a token's text names none."""

    text: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Marker:
    """A marker of the format, by its text."""

    text: str


class MarkerScanner:
    """Splits generated tokens into text and markers.

    A marker of one token is found by its id; the same characters from other tokens are text. An end of the text that
    could begin another marker is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], markers: Iterable[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt)
        ids = {marker: tokenizer.token_id(marker) for marker in markers}
        self._by_id = {id: marker for marker, id in ids.items() if id is not None}
        self._texts = tuple(marker for marker, id in ids.items() if id is None)
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) if self._texts else "(?!)")
        self._held: list[Chunk] = []
        self._pending: list[int] = []  # tokens whose text the detokenizer holds back
        self._count = 0

    def add(self, token: int) -> list[Chunk | Marker]:
        """Add a token: the texts and markers that it completes."""
        number = self._count
        self._count += 1
        marker = self._by_id.get(token)
        if marker is not None:
            return [*self.flush(), Marker(marker)]
        self._pending.append(number)
        self._hold(self._detokenizer.add(token))
        return self._found(final=False)

    def flush(self) -> list[Chunk | Marker]:
        """End the text: what was held back."""
        self._hold(self._detokenizer.flush())
        return self._found(final=True)

    def _hold(self, text: str) -> None:
        """Hold the text of the pending tokens, once the detokenizer has given it."""
        if self._pending and not self._detokenizer.num_pending:
            self._held.append(Chunk(text, tuple(self._pending)))
            self._pending = []

    def _found(self, *, final: bool) -> list[Chunk | Marker]:
        items: list[Chunk | Marker] = []
        while True:
            text = "".join(chunk.text for chunk in self._held)
            found = self._pattern.search(text)
            if found is None:
                held = 0 if final else max((overlap(text, marker) for marker in self._texts), default=0)
                return [*items, *self._take(len(text) - held)]
            items += [*self._take(found.start()), Marker(found[0])]
            self._take(len(found[0]))

    def _take(self, length: int) -> list[Chunk]:
        """Take so many characters from the front of the held text; chunks without text with those before them."""
        taken = []
        while self._held and len(self._held[0].text) <= length:
            chunk = self._held.pop(0)
            length -= len(chunk.text)
            taken.append(chunk)
        if length:
            chunk = self._held[0]
            taken.append(Chunk(chunk.text[:length], chunk.tokens))
            self._held[0] = Chunk(chunk.text[length:])
        return taken
