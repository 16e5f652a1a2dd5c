"""The Hugging Face client as npuq uses it: repository names, who asks, retries with back-off, errors in one line."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import __version__
from ..errors import HubError

T = TypeVar("T")

# huggingface_hub 1.x stands on httpx, 2.x on httpx2; the base of its own HTTP error is the base of either's errors.
_ANY_HTTP_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
_TRANSIENT_STATUS = (408, 409, 412, 425, 429)
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Backoff:
    """How often to try again after a fault that may pass, and how long to wait in between: doubling, with jitter."""

    attempts: int = 6
    first_seconds: float = 1.0
    most_seconds: float = 60.0

    def wait(self, attempt: int) -> None:
        """Sleep before the attempt after number `attempt` (from 1)."""
        seconds = min(self.first_seconds * 2 ** (attempt - 1), self.most_seconds)
        time.sleep(seconds * random.uniform(0.75, 1.25))


class Hub:
    """A hub and one repository there, as one user sees them. `token` None: the ecosystem's own (HF_TOKEN, hf auth)."""

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        if not is_repo_id(repo):
            raise HubError(f"{repo!r} is not a repository: write it as user/name")
        self.repo = repo
        self.backoff = backoff or Backoff()
        self._token = token
        self.api = HfApi(token=token, library_name="npuq", library_version=__version__)

    def call(self, doing: str, action: Callable[[], T], attempts: int | None = None) -> T:
        """Do `action`, again after faults that may pass; other errors become a HubError that begins with `doing`.

        `attempts` is for what the client repeats by itself, so that waiting does not multiply.
        """
        attempt, attempts = 1, attempts or self.backoff.attempts
        while True:
            try:
                return action()
            except Exception as error:
                if not is_transient(error) or attempt >= attempts:
                    translated = self.translate(doing, error)
                    if translated is None:
                        raise
                    raise translated from None
            self.backoff.wait(attempt)
            attempt += 1

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Errors of the hub that are raised inside become a HubError that begins with `doing`."""
        try:
            yield
        except Exception as error:
            translated = self.translate(doing, error)
            if translated is None:
                raise
            raise translated from None

    def translate(self, doing: str, error: BaseException) -> HubError | None:
        """One line for the user; None for an error that is not the hub's, nor the connection's, nor the disk's.

        Raised `from None`: the original carries request headers.
        """
        if isinstance(error, HubError):
            return error
        reason = self._reason(_innermost(error))
        if reason is None:
            return None
        return HubError(self._without_token(" ".join(f"{doing}: {reason}".split())))

    def _reason(self, error: BaseException) -> str | None:
        if isinstance(error, LocalTokenNotFoundError):
            return f"no token: make one with write access at {_TOKEN_PAGE} and set HF_TOKEN, or run `hf auth login`"
        if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
            return f"not in the local cache, and the hub cannot be asked ({_brief(error)})"
        if isinstance(error, GatedRepoError):
            return (
                f"{self.repo} is gated: ask for access at {self.api.endpoint}/{self.repo}, then give that user's token"
            )
        if isinstance(error, RepositoryNotFoundError):
            return f"there is no repository {self.repo}, or this token may not see it"
        if isinstance(error, RevisionNotFoundError):
            return f"{self.repo} has no such revision"
        if isinstance(error, EntryNotFoundError):
            return f"{self.repo} has no such file"
        if isinstance(error, HFValidationError):
            return f"{self.repo!r} is not a name the hub accepts: {_brief(error)}"
        if isinstance(error, HfHubHTTPError):
            return self._status_reason(error)
        if isinstance(error, (_ANY_HTTP_ERROR, ConnectionError, TimeoutError)):
            return f"the connection failed ({_brief(error)}); run the same command again: it continues"
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk; make room and run the same command again: it continues"
        if isinstance(error, OSError) and error.errno is not None:
            return f"{error.filename or 'a file'}: {error.strerror}"
        return None

    def _status_reason(self, error: HfHubHTTPError) -> str:
        status = error.response.status_code
        said = error.server_message or ""
        if status == 401:
            return f"the hub does not accept the token; make a new one at {_TOKEN_PAGE} and set HF_TOKEN"
        if status == 403:
            return (
                f"the token may not write to {self.repo}; give one with write access, from {_TOKEN_PAGE} {_said(said)}"
            )
        if status == 429:
            return "the hub limits this user's requests; wait and run the same command again: it continues"
        if status >= 500:
            return f"the hub keeps failing (status {status}); run the same command again later: it continues"
        return f"the hub refused (status {status}) {_said(said)}"

    def _without_token(self, text: str) -> str:
        for token in (self._token, get_token()):
            if token:
                text = text.replace(token, "***")
        return text


def is_repo_id(text: str) -> bool:
    """Whether a text could name a repository: `user/name`, and nothing a path would need."""
    return _REPO_ID.fullmatch(text) is not None


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a lost connection, a busy or restarting server."""
    error = _innermost(error)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return False
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # A refused upload of content means that its signed address has expired: the next attempt gets a new one.
        expired = status == 403 and error.response.request.method == "PUT"
        return status >= 500 or status in _TRANSIENT_STATUS or expired
    return isinstance(error, (_ANY_HTTP_ERROR, ConnectionError, TimeoutError))


def _innermost(error: BaseException) -> BaseException:
    """The client wraps what happens in its upload threads in a RuntimeError, and why a cache entry is missing."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _said(message: str) -> str:
    return f"(it says: {' '.join(message.split())[:160]})" if message else ""
