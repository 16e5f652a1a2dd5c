"""What a client asks of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .sampling.grammar import Grammar
from .sampling.params import SamplingParams
from .text.replies.formats import PLAIN, ReplyFormat


@dataclass(frozen=True)
class Request:
    """Prompts to continue with the same parameters, each `params.n` times.

    prompts: token ids. grammar: makes the grammar of one completion, in its first state. salt: the prompts share cache
    blocks only with those of requests with the same salt, so that nobody else can tell what they begin with. reply: the
    format of the completions.
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    grammar: Callable[[], Grammar] | None = None
    salt: bytes = b""
    reply: ReplyFormat = PLAIN
