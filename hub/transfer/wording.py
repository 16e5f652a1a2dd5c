"""What went wrong between npuq and a hub, in words for the user: one line, no secrets, and whether to try again."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterable
from typing import Final
from urllib.parse import unquote

from ...errors import HubError
from ...inputs.printable import printable

_TRANSIENT_STATUS: Final = (408, 409, 412, 425, 429)
# What the server does not implement, and a store that is full.
_LASTING_STATUS: Final = (501, 505, 507)
_DISK_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_INSECURE: Final = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "UNSUPPORTED_PROTOCOL")
_AGAIN: Final = "run the same command again: it continues"
# A message may have cut a secret short: this much of its beginning is taken for it.
_TELLING_CHARACTERS: Final = 8


class PassingError(HubError):
    """A failure that may be over when the same command is run again; its message says so."""


class OfflineError(HubError):
    """The hub may not be asked, and what is here does not do."""


def may_pass(status: int) -> bool:
    """Whether a server that answers with an error status may do otherwise later."""
    return status in _TRANSIENT_STATUS or (status >= 500 and status not in _LASTING_STATUS)


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
    where = without_userinfo(where)
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
    if error.errno in _DISK_FULL:
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


def without_userinfo(url: str) -> str:
    """An address without the user's name and password for it."""
    if "@" not in url:
        return url
    scheme, separator, _ = url.rpartition("@")[0].partition("://")
    return f"{scheme if separator else 'https'}://{url.rpartition('@')[2]}"


def passwords_in(url: str) -> list[str]:
    """The password in an address, as it stands there and as it is meant."""
    password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
    return [password, unquote(password)]


def without_secrets(text: str, secrets: Iterable[str | None]) -> str:
    """A message in which `***` stands for each of these secrets, also where it is cut short."""
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
