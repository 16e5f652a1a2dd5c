"""Tokens and their log-probabilities as clients read them."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Final

import msgspec

from ..runtime import Tokenizer, TokenLogprobs

_LEAST: Final = -9999.0
"""Stands for the logarithm of 0, which JSON does not have."""


class CompletionLogprobs(msgspec.Struct):
    """Log-probabilities of a completion's tokens, in lists; the first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def extend(self, others: CompletionLogprobs) -> None:
        """Append the tokens that follow."""
        for name in self.__struct_fields__:
            getattr(self, name).extend(getattr(others, name))


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token; of one that is a part of a character its bytes, as in `bytes:\\xe2\\x82`."""
    content = tokenizer.token_bytes(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join([f"\\x{byte:02x}" for byte in content])


def finite(logprob: float) -> float:
    """A log-probability as JSON can have it."""
    return logprob if logprob > _LEAST else _LEAST


class TokenLists:
    """Lists for the tokens of one text, a part at a time. An offset is the number of characters before a token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, tokens: list[int], logprobs: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """Lists of a prompt, whose first token has no log-probability."""
        self._step(tokens[0])
        lists = self.next(logprobs)
        lists.tokens.insert(0, token_text(self._tokenizer, tokens[0]))
        lists.token_logprobs.insert(0, None)
        lists.top_logprobs.insert(0, None)
        lists.text_offset.insert(0, 0)
        return lists

    def next(self, logprobs: Iterable[TokenLogprobs]) -> CompletionLogprobs:
        """Lists of the next tokens."""
        lists = CompletionLogprobs([], [], [], [])
        for entry in logprobs:
            text = token_text(self._tokenizer, entry.token)
            top = {token_text(self._tokenizer, token): finite(value) for token, value in entry.top}
            lists.tokens.append(text)
            lists.token_logprobs.append(finite(entry.logprob))
            lists.top_logprobs.append({**top, text: finite(entry.logprob)})
            lists.text_offset.append(self._offset)
            self._step(entry.token)
        return lists

    def _step(self, token: int) -> None:
        if token not in self._special:  # whose text is left out
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
