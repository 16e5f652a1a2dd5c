"""A reply without a format, as text alone."""

from __future__ import annotations

from collections.abc import Sequence

from npuq.runtime.text.replies.reply import Reply
from npuq.runtime.text.tokenizer import Tokenizer


class PlainText:
    """Text of tokens up to the first stop string. num_settled: tokens whose text was returned."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str], min_tokens: int = 0):
        self._reply = Reply(tokenizer, prompt, stop, min_tokens)
        self.num_settled = 0

    @property
    def text(self) -> str:
        return self._reply.text

    @property
    def stopped(self) -> bool:
        return self._reply.stopped

    def add(self, token: int) -> str:
        return self._text(self._reply.add(token))

    def flush(self) -> str:
        return self._text(self._reply.flush())

    def _text(self, parts: list) -> str:
        self.num_settled += sum(len(part.tokens) for part in parts)
        return "".join(part.text for part in parts)
