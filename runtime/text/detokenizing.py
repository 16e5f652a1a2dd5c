"""Decoding of a growing sequence: text that is final, and the end at a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from ...errors import GenerationError
from .tokenizer import Tokenizer

_MAX_HELD: Final = 16
"""Tokens that text may be held back for while it ends in an unfinished UTF-8 sequence."""

_CONTEXT: Final = 4
_MOST_CONTEXT: Final = 16
"""Tokens of context: so many at least and at most. Between the two the length of their text is known."""

_MOST_TOKEN_CHARACTERS: Final = 1 << 16
"""Text of one token. The longest of known tokenizers are runs of some hundred spaces."""


class Detokenizer:
    """Incremental decoder of tokens. Text once returned never changes.

    A token can end within a UTF-8 sequence: its text is held back until the sequence is complete. Text is decoded with
    a few tokens before it, because decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._context = list(prompt[-_CONTEXT:])
        self._context_characters: int | None = None  # of their text, once it is needed
        self._pending: list[int] = []

    @property
    def num_pending(self) -> int:
        """Number of tokens whose text is held back."""
        return len(self._pending)

    def add(self, token: int) -> str:
        """Add a token: the text that it makes final, often empty."""
        self._pending.append(token)
        text = self._text()
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._pending) < _MAX_HELD:
            return ""
        return self._give(text)

    def flush(self) -> str:
        """End the text: the part held back, incomplete UTF-8 sequences as U+FFFD."""
        return self._give(self._text()) if self._pending else ""

    def _text(self) -> str:
        if self._context_characters is None:
            self._context_characters = len(self._tokenizer.decode(self._context))
        return self._tokenizer.decode([*self._context, *self._pending])[self._context_characters :]

    def _give(self, text: str) -> str:
        if len(text) > _MOST_TOKEN_CHARACTERS:
            raise GenerationError(
                f"token {self._pending[-1]} is a text of {len(text)} characters; is the tokenizer damaged?"
            )
        if text:  # special tokens, which have no text, must not use up the context
            self._context += self._pending
            if self._context_characters is not None:
                self._context_characters += len(text)
            if len(self._context) > _MOST_CONTEXT:
                del self._context[:-_CONTEXT]
                self._context_characters = None
        self._pending = []
        return text


class StopSearch:
    """A growing text up to the first stop string, after which `stopped` is True.

    An end of the text that could begin a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = tuple(stop)
        self._held = ""
        self._given: list[str] = []
        self._given_length = 0
        self._text_length = 0
        self._unsettled: deque[tuple[int, int, int]] = deque()  # of tokens: where their text begins and ends, number
        self._settled: list[int] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """The text returned so far."""
        return "".join(self._given)

    def add(self, text: str, tokens: Iterable[int], *, early: bool = False) -> str:
        """Add the text that some tokens share: the text that is final now.

        tokens: their numbers. early: the text neither holds nor begins a stop string.
        """
        if self.stopped:
            return ""
        start = self._text_length
        self._text_length += len(text)
        self._unsettled.extend((start, self._text_length, number) for number in tokens)
        self._held += text
        if early:
            return self._give(len(self._held))
        found = [place for place in map(self._held.find, self._stop) if place >= 0]
        if found:
            self.stopped = True
            given = self._give(min(found))
            self._held = ""
            return given
        return self._give(len(self._held) - max((overlap(self._held, stop) for stop in self._stop), default=0))

    def flush(self) -> str:
        """End the text: the part held back, which begins no stop string."""
        return "" if self.stopped else self._give(len(self._held))

    def take_settled(self) -> tuple[int, ...]:
        """Numbers of the tokens whose text was returned since the last call, at least its beginning."""
        settled, self._settled = tuple(self._settled), []
        return settled

    def _give(self, length: int) -> str:
        given, self._held = self._held[:length], self._held[length:]
        self._given.append(given)
        self._given_length += len(given)
        while self._unsettled:
            start, end, number = self._unsettled[0]
            if start >= self._given_length and end > self._given_length:
                break
            self._unsettled.popleft()
            self._settled.append(number)
        return given


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
