"""Limits of a server: what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_TOP_LOGPROBS: Final = 20
MOST_LOGPROBS: Final = 5
MOST_STOPS: Final = 16
MOST_STOP_CHARACTERS: Final = 256
MOST_BIASES: Final = 1024


@dataclass(frozen=True)
class Limits:
    """max_body: bytes of a request. max_queue: requests that wait or run. max_queued_tokens: prompt tokens of those
    that wait. max_choices: `n` of a request. max_prompts: prompts of a request, each times n.
    """

    max_body: int = 8 << 20
    max_queue: int = 64
    max_queued_tokens: int = 1 << 18
    max_choices: int = 16
    max_prompts: int = 128
