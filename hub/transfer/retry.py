"""Retries after transient faults: their number, and the waits between them."""

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
_MOST_RETRY_AFTER: Final = 330.0


@dataclass(frozen=True)
class Backoff:
    """The number of attempts after transient faults, and the waits between them in seconds: doubling, with jitter."""

    attempts: int = 6
    first_seconds: float = 1.0
    most_seconds: float = 60.0

    def wait(self, attempt: int, at_least: float = 0.0) -> None:
        """Sleep after attempt number `attempt` (from 1), for at least the server's `at_least` seconds."""
        seconds = min(self.first_seconds * 2 ** (attempt - 1), self.most_seconds)
        time.sleep(max(seconds * random.uniform(0.75, 1.25), min(at_least, _MOST_RETRY_AFTER)))


class Client(Protocol):
    """The errors of a hub's client: their types, the transient ones, and their messages."""

    @property
    def backoff(self) -> Backoff: ...

    @property
    def raised(self) -> tuple[type[Exception], ...]:
        """The types of errors of requests; any other is a bug, or an error of the bytes' receiver."""

    def is_transient(self, error: BaseException) -> bool:
        """True where the same request may soon succeed."""

    def retry_after(self, error: BaseException) -> float:
        """The seconds to wait that an answer demands; 0 without a demand."""

    def failure(self, doing: str, error: Exception) -> NpuqError:
        """The error for the user, in one line that begins with `doing`. Raise it `from None`: the original may hold a
        request with its token."""


class ClientError(Exception):
    """A builtin error (its cause) inside a hub's client, which could not parse an answer."""


@contextmanager
def client_code(raised: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn builtin errors, such as ValueError, inside calls of a hub's client into ClientError: they are no bugs of
    npuq.

    The client's own errors (`raised`) pass.
    """
    try:
        yield
    except raised:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ClientError from error


class Retries:
    """The attempts of one task; `doing` begins the message of the last failure."""

    def __init__(self, client: Client, doing: str, attempts: int | None = None):
        self._client = client
        self._doing = doing
        self._attempts = attempts or client.backoff.attempts
        self._failures = 0

    def wait_after(self, error: Exception, *, progressed: bool = False) -> None:
        """Wait before the next attempt. Raises the client's error for the user where another attempt cannot help.

        Attempts count anew where this one `progressed`.
        """
        self._failures = 0 if progressed else self._failures + 1
        if not self._client.is_transient(error) or self._failures >= self._attempts:
            raise self._client.failure(self._doing, error) from None
        self._client.backoff.wait(max(self._failures, 1), self._client.retry_after(error))


def retried(client: Client, doing: str, action: Callable[[], T], attempts: int | None = None) -> T:
    """Do `action`, again after transient faults; other errors become a HubError that begins with `doing`.

    attempts: fewer where the client itself retries, so that waits do not multiply.
    """
    retries = Retries(client, doing, attempts)
    while True:
        try:
            return action()
        except client.raised as error:  # noqa: PERF203
            retries.wait_after(error)
