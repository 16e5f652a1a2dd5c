"""What went wrong while talking to a hub, in words; and whether the same request may succeed a little later."""

from __future__ import annotations

import errno
import ssl
from importlib import import_module
from typing import Final

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ..errors import HubError, NpuqError
from ..inputs.printable import printable

# huggingface_hub 1.x stands on httpx, 2.x on httpx2: the base of its own HTTP error tells which.
_HTTP = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
HTTP_ERROR: Final[type[Exception]] = _HTTP.HTTPError
_LOST: Final[tuple[type[Exception], ...]] = (
    _HTTP.TimeoutException,
    _HTTP.NetworkError,
    _HTTP.RemoteProtocolError,
    ConnectionError,
    TimeoutError,
)
_TRANSIENT_STATUS: Final = (408, 409, 412, 425, 429)
# What the server does not implement, and a store that is full.
_LASTING_STATUS: Final = (501, 505, 507)
DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_INSECURE: Final = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL")
_AGAIN: Final = "run the same command again: it continues"
# What a client raises when an answer is not what its protocol says.
NOT_UNDERSTOOD: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError)
# What talking to a hub may raise at all; anything else is a mistake of ours.
RAISED: Final[tuple[type[Exception], ...]] = (NpuqError, HTTP_ERROR, _HTTP.InvalidURL, OSError, *NOT_UNDERSTOOD)


class PassingError(HubError):
    """A failure that may be over when the same command is run again; its message says so."""


class OfflineError(HubError):
    """The hub may not be asked, and what is here does not do."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a lost connection, a busy or restarting server."""
    error = innermost(error)
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)) or is_insecure(error):
        return False
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        # A refused upload of content means that its signed address has expired: the next attempt gets a new one.
        return may_pass(status) or (status == 403 and is_store(error))
    # Another thread's lost connection makes the client close all of them.
    return isinstance(error, _LOST) or (isinstance(error, RuntimeError) and "client has been closed" in str(error))


def may_pass(status: int) -> bool:
    """Whether a server that answers with an error status may do otherwise later."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _LASTING_STATUS)


def is_store(error: HfHubHTTPError) -> bool:
    """Whether the refusal came from where uploads are stored, not from the hub."""
    return bool(error.response.request.method == "PUT")


def is_insecure(error: BaseException) -> bool:
    """Whether the other side's certificate was not accepted, or it does not speak TLS at all."""
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return False
        if isinstance(link, ssl.SSLError) and link.reason in _INSECURE:
            return True
        link = link.__cause__ or link.__context__
    return False


def connection_failed(where: str, error: BaseException, *, passing: bool) -> HubError:
    """The error for a request that got no answer, which `passing` says may come later."""
    if is_insecure(error):
        return HubError(
            f"no secure connection to {where} ({brief(error)}); check that address, the clock and the proxy"
        )
    if passing:
        return PassingError(f"the connection to {where} failed ({brief(error)}); {_AGAIN}")
    return HubError(f"{where} cannot be asked ({brief(error)}); check that address and the proxy")


def status_failed(status: int, said: str) -> HubError:
    """The error for an answer with an error status that has no better one."""
    if status == 429:
        return PassingError(f"the hub limits this user's requests; wait and {_AGAIN}")
    if not may_pass(status):
        return HubError(f"the hub refused (status {status}) {quoted(said)}")
    keeps = "failing" if status >= 500 else "refusing"
    return PassingError(f"the hub keeps {keeps} (status {status}) {quoted(said)}; later {_AGAIN}")


def disk_failed(error: OSError) -> HubError:
    """The error for a file of ours that could not be read or written."""
    name = f"{printable(str(error.filename))}: " if error.filename else ""
    if error.errno in DISK_FULL:
        return PassingError(f"{name}no space left on the disk; make room and {_AGAIN}")
    return HubError(f"{name}{error.strerror or brief(error)}")


def no_thread(error: BaseException) -> HubError:
    """The error for a system that gives no thread, to us or to the client."""
    return HubError(f"{brief(error)}: this user has as many as the system allows (ulimit -u); end some")


def not_understood(error: BaseException) -> HubError:
    """The error for an answer that the client could not make sense of, or that it tells of as a plain ValueError."""
    if "start new thread" in str(error):
        return no_thread(error)
    if "returned errors" in str(error):  # of the LFS batch, for one file
        return HubError(f"the hub refused ({brief(error)})")
    return HubError(f"the hub's answer is not understood ({type(error).__name__}: {brief(error)})")


def innermost(error: BaseException) -> BaseException:
    """The client wraps what happens in its upload threads in a RuntimeError, and why a cache entry is missing."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def one_line(text: str) -> str:
    """A text from outside as part of a message."""
    return printable(" ".join(text.split()))


def brief(error: BaseException) -> str:
    """An error's own text, short."""
    text = one_line(str(error)) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def quoted(said: str) -> str:
    """What a server says of a refusal, in brackets; nothing when it says nothing."""
    return f"(it says: {one_line(said)[:160]})" if said.strip() else ""
