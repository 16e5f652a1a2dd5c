"""Limits of a server: what it refuses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MOST_TOP_LOGPROBS: Final = 20
"""Of chat's `top_logprobs`."""
MOST_LOGPROBS: Final = 5
"""Of completions' `logprobs`."""
MOST_STOPS: Final = 16
MOST_STOP_CHARACTERS: Final = 256
MOST_BIASES: Final = 1024
MOST_TOOLS: Final = 128
BODY_SECONDS: Final = 60.0
"""A body has to arrive within this time."""
PING_SECONDS: Final = 15.0
"""A stream without events gets a comment after this time: proxies close silent connections."""
SEND_SECONDS: Final = 60.0
"""A client that takes nothing for this time is gone; it is looked for as often, so it may have twice as long."""
SEND_BYTES: Final = 1 << 14
SEND_SHARE: Final = 16
"""A client that takes fewer than these bytes in that time, or than 1/SEND_SHARE of what waits, is gone, too, unless it
takes all. So 60 MB are taken in an hour and a half, or not at all."""
MOST_RETRY_SECONDS: Final = 120


@dataclass(frozen=True)
class Limits:
    """Limits that a server's owner may set.

    max_body: bytes of a request. max_queue: requests that wait or run. max_queued_tokens: prompt tokens that wait; one
    request may have more while none waits, unless it asks for their log-probabilities (about 1 KB each). max_choices:
    `n` of a request. max_prompts: prompts of a request, each times n. request_seconds: from a request's admission to
    its end; 0: any.
    """

    max_body: int = 8 << 20
    max_queue: int = 64
    max_queued_tokens: int = 1 << 18
    max_choices: int = 16
    max_prompts: int = 128
    request_seconds: float = 0.0
