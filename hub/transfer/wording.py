"""Messages of failed exchanges with a hub: one line, without secrets, with advice on trying again."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from ...errors import HubError
from ...inputs.printable import printable

_TRANSIENT_STATUS: Final = (408, 409, 412, 425, 429)
# Not implemented by the server, and a full store.
_LASTING_STATUS: Final = (501, 505, 507)
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_INSECURE: Final = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL")
_AGAIN: Final = "run the same command again: it continues"
# A message may contain a truncated secret: this many characters of its beginning identify it.
_TELLING_CHARACTERS: Final = 8


class PassingError(HubError):
    """A transient failure; its message advises to run the same command again."""


class OfflineError(HubError):
    """The hub is disabled (offline mode), and the local files do not suffice."""


def may_pass(status: int) -> bool:
    """True for an error status that may be transient."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _LASTING_STATUS)


def is_insecure(error: BaseException) -> bool:
    """True for a rejected certificate, and for a server without TLS."""
    link: BaseException | None = error
    for _ in range(8):
        if link is None:
            return False
        if isinstance(link, ssl.SSLError) and link.reason in _INSECURE:
            return True
        link = link.__cause__ or link.__context__
    return False


def connection_failed(where: str, error: BaseException, *, passing: bool) -> HubError:
    """The error for a request without an answer; `passing`: a later one may succeed."""
    where = without_userinfo(where)
    if is_insecure(error):
        return HubError(
            f"no secure connection to {where} ({brief(error)}); check that address, the clock and the proxy"
        )
    if passing:
        return PassingError(f"the connection to {where} failed ({brief(error)}); {_AGAIN}")
    return HubError(f"{where} cannot be asked ({brief(error)}); check that address and the proxy")


def status_failed(status: int, reason: str) -> HubError:
    """The general error for an answer with an error status."""
    if status == 429:
        return PassingError(f"the hub limits this user's requests; wait and {_AGAIN}")
    if not may_pass(status):
        return HubError(f"the hub refused (status {status}) {quoted(reason)}")
    keeps = "failing" if status >= 500 else "refusing"
    return PassingError(f"the hub keeps {keeps} (status {status}) {quoted(reason)}; later {_AGAIN}")


def disk_failed(error: OSError) -> HubError:
    """The error for a local file that could not be read or written."""
    name = f"{printable(str(error.filename))}: " if error.filename else ""
    if error.errno in _DISK_FULL:
        return PassingError(f"{name}no space left on the disk; make room and {_AGAIN}")
    return HubError(f"{name}{error.strerror or brief(error)}")


def no_thread(error: BaseException) -> HubError:
    """The error for a system that starts no thread, for npuq or the client."""
    return HubError(f"{brief(error)}: this user has as many as the system allows (ulimit -u); end some")


def not_understood(error: BaseException) -> HubError:
    """The error for an answer that the client could not parse, or reports as a ValueError."""
    if "start new thread" in str(error):
        return no_thread(error)
    if "returned errors" in str(error):  # the LFS batch's answer for one file
        return HubError(f"the hub refused ({brief(error)})")
    return HubError(f"the hub's answer is not understood ({type(error).__name__}: {brief(error)})")


def one_line(text: str) -> str:
    """Shorten a text from outside to one printable line for a message."""
    return printable(" ".join(text.split()))


def brief(error: BaseException) -> str:
    """An error's own text, shortened."""
    text = one_line(str(error)) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def quoted(reason: str) -> str:
    """A server's reason for a refusal, in brackets; empty without a reason."""
    return f"(it says: {one_line(reason)[:160]})" if reason.strip() else ""


def without_userinfo(url: str) -> str:
    """Remove the user's name and password from an address."""
    if "@" not in url:
        return url
    scheme, separator, _ = url.rpartition("@")[0].partition("://")
    return f"{scheme if separator else 'https'}://{url.rpartition('@')[2]}"


def passwords_in(url: str) -> list[str]:
    """The password in an address, encoded and decoded."""
    password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
    return [password, unquote(password)]


def without_secrets(text: str, secrets: Iterable[str | None]) -> str:
    """Replace each of these secrets in a message by `***`, truncated ones too."""
    for secret in filter(None, secrets):
        text = _hidden(text, secret)
    return text.strip()


def _hidden(text: str, secret: str) -> str:
    beginning, kept, position = secret[:_TELLING_CHARACTERS], "", 0
    while (found := text.find(beginning, position)) >= 0:
        kept += text[position:found] + "***"
        position, rest = found, iter(secret)
        while text[position : position + 1] == next(rest, None):
            position += 1
    return kept + text[position:]
