"""Trying again after faults that may pass: how often, and how long to wait in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from ...errors import NpuqError

T = TypeVar("T")

# Hubs count requests over five minutes.
_MOST_ASKED_SECONDS: Final = 330.0


@dataclass(frozen=True)
class Backoff:
    """How often to try again after a fault that may pass, and how long to wait in between: doubling, with jitter."""

    attempts: int = 6
    first_seconds: float = 1.0
    most_seconds: float = 60.0

    def wait(self, attempt: int, asked: float = 0.0) -> None:
        """Sleep before the attempt after number `attempt` (from 1); no less than a server `asked` for."""
        seconds = min(self.first_seconds * 2 ** (attempt - 1), self.most_seconds)
        time.sleep(max(seconds * random.uniform(0.75, 1.25), min(asked, _MOST_ASKED_SECONDS)))


class Client(Protocol):
    """How talking to a hub fails: what is raised, what of it may pass, and what the user is told."""

    @property
    def backoff(self) -> Backoff: ...

    @property
    def raised(self) -> tuple[type[Exception], ...]:
        """What asking may raise; anything else is a mistake of ours, or of whoever takes the bytes."""

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same request may succeed a little later."""

    def asked_seconds(self, error: BaseException) -> float:
        """How long an answer asks to wait; 0 where it does not say."""

    def failure(self, doing: str, error: Exception) -> NpuqError:
        """The error for the user, in one line that begins with `doing`. Raise it `from None`: the original may hold a
        request with its token."""


class ClientError(Exception):
    """A plain error (its cause) out of the code of a hub's client: it could not make sense of an answer."""


@contextmanager
def client_code(raised: tuple[type[Exception], ...]) -> Iterator[None]:
    """Around calls of a hub's client alone: a ValueError of its making is no mistake of ours, and becomes ClientError.

    What the client raises on purpose (`raised`) passes.
    """
    try:
        yield
    except raised:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ClientError from error


class Retries:
    """The attempts of one piece of work; `doing` begins the message when they end."""

    def __init__(self, client: Client, doing: str, attempts: int | None = None):
        self._client = client
        self._doing = doing
        self._attempts = attempts or client.backoff.attempts
        self._failures = 0

    def wait_after(self, error: Exception, *, progressed: bool = False) -> None:
        """Wait before the next attempt. Raises the client's error for the user where none may help.

        Attempts count anew where this one `progressed`.
        """
        self._failures = 0 if progressed else self._failures + 1
        if not self._client.is_transient(error) or self._failures >= self._attempts:
            raise self._client.failure(self._doing, error) from None
        self._client.backoff.wait(max(self._failures, 1), self._client.asked_seconds(error))


def retried(client: Client, doing: str, action: Callable[[], T], attempts: int | None = None) -> T:
    """Do `action`, again after faults that may pass; other errors become a HubError that begins with `doing`.

    `attempts` is for what the client repeats by itself, so that waiting does not multiply.
    """
    retries = Retries(client, doing, attempts)
    while True:
        try:
            return action()
        except client.raised as error:  # noqa: PERF203
            retries.wait_after(error)
