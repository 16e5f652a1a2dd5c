"""The state of a compiled grammar after some tokens, and the limit on numbers and white space in JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ....errors import GenerationError
from ....inputs.printable import error_line

_MOST_DIGITS: Final = 32
_MOST_SPACE: Final = 32
_DIGITS: Final = frozenset(b"0123456789")
_SPACE: Final = frozenset(b" \t\r\n")


class MatchedGrammar:
    """A Grammar by a matcher of llguidance. size: of the vocabulary. runs: limits numbers and white space of JSON."""

    def __init__(self, matcher: Any, size: int, runs: JsonRuns | None = None):
        self._matcher = matcher
        self._size = size
        self._runs = runs

    def mask(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        return mask if self._runs is None else self._runs.limited(mask)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()
        if self._runs is not None:
            self._runs.accept(token)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = error_line(ValueError(self._matcher.get_error()), 200)
            raise GenerationError(f"the grammar of this request cannot go on: {reason}")


class JsonRuns:
    """A limit on digits and white space in a row outside of strings: JSON has none, and models get stuck there.

    tokens: bytes by token id. first_bytes: uint8, the first byte of each.
    """

    def __init__(self, tokens: Sequence[bytes], first_bytes: NDArray[np.uint8]):
        self._tokens = tokens
        self._first_bytes = first_bytes
        self._in_text = self._escaped = False
        self._digits = self._space = 0

    def limited(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The mask without tokens that would go on with a run that has reached its limit, unless none is left."""
        for length, most, kind in ((self._digits, _MOST_DIGITS, _DIGITS), (self._space, _MOST_SPACE, _SPACE)):
            if length >= most and not self._in_text:
                others = mask & ~np.isin(self._first_bytes, list(kind))
                return others if others.any() else mask
        return mask

    def accept(self, token: int) -> None:
        """Go on to the state after a token."""
        for byte in self._tokens[token] if token < len(self._tokens) else b"":
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped, self._in_text = byte == 0x5C, byte != 0x22
            else:
                self._in_text = byte == 0x22
            counts = not self._in_text
            self._digits = self._digits + 1 if counts and byte in _DIGITS else 0
            self._space = self._space + 1 if counts and byte in _SPACE else 0
