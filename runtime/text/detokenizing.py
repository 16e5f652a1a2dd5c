"""The text of a sequence as it grows: what may be given out, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Detokenizer, Tokenizer


class TextStream:
    """Collects a sequence's text; `stopped` once a stop string was met, which is not part of it.

    The end of the text is held back for as long as it could be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = tuple(stop)
        self._held = ""
        self._given: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._given)

    def add(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._advance(self._detokenizer.add(token))

    def flush(self) -> str:
        """The rest, at the end: what was held back is no stop string after all."""
        if self.stopped:
            return ""
        return self._advance(self._detokenizer.flush()) + self._give(len(self._held))

    def _advance(self, text: str) -> str:
        self._held += text
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            given = self._give(min(found))
            self._held = ""
            return given
        return self._give(len(self._held) - max((_overlap(self._held, stop) for stop in self._stop), default=0))

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        self._given.append(given)
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with, short of the whole of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
