"""The errors of huggingface_hub: the transient ones, and those that are not npuq's own bugs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Final

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers

from ...errors import NpuqError
from ..transfer.retry import ClientError, client_code
from ..transfer.wording import is_insecure, may_pass

# huggingface_hub 1.x uses httpx, 2.x httpx2: the module of its HTTP error's base class shows which.
_HTTP = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
HTTP_ERROR: Final[type[Exception]] = _HTTP.HTTPError
_LOST: Final[tuple[type[Exception], ...]] = (
    _HTTP.TimeoutException,
    _HTTP.NetworkError,
    _HTTP.RemoteProtocolError,
    ConnectionError,
    TimeoutError,
)
# All errors of the hub and the connection; any other is a bug of npuq.
RAISED: Final[tuple[type[Exception], ...]] = (NpuqError, HTTP_ERROR, _HTTP.InvalidURL, OSError, ClientError)


def of_the_client() -> AbstractContextManager[None]:
    """The context of calls of the client alone: `client_code` of huggingface_hub."""
    return client_code(RAISED)


def is_transient(error: BaseException) -> bool:
    """True where the same request may soon succeed: a lost connection, a busy or restarting server."""
    error = innermost(error)
    if isinstance(error, OfflineModeIsEnabled) or is_insecure(error):
        return False
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # A refused upload of content means that its signed address has expired: the next attempt gets a new one.
        return may_pass(status) or (status == 403 and is_store(error))
    # Another thread's lost connection makes the client close all of them.
    return isinstance(error, _LOST) or (isinstance(error, RuntimeError) and "client has been closed" in str(error))


def is_store(error: HfHubHTTPError) -> bool:
    """True for a refusal of the uploads' storage server, not of the hub."""
    return bool(error.response.request.method == "PUT")


def innermost(error: BaseException) -> BaseException:
    """The original error: the client wraps errors of its own threads in a RuntimeError."""
    while isinstance(error, (ClientError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def retry_after(error: BaseException) -> float:
    """The seconds to wait that an answer demands (Retry-After, rate limits); 0 without a demand."""
    error = innermost(error)
    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (429, 503):
        return 0.0
    headers = error.response.headers
    try:
        limit = parse_ratelimit_headers(headers)
    except ValueError:  # numbers of too many digits
        limit = None
    if limit is not None and limit.remaining == 0:
        return float(min(limit.reset_in_seconds, 10**6)) + 1
    after = headers.get("Retry-After", "").strip()
    return float(after) if after.isdecimal() and len(after) < 7 else 0.0
