"""Bytes of one hub file, by range requests: resumed inside the file, after a fault and after a kill."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from ..errors import HubError
from .client import Hub, is_transient

_CHUNK = 1 << 20


class Digest(Protocol):
    """What hashlib's objects do."""

    def update(self, data: bytes, /) -> None: ...


def file_url(hub: Hub, name: str, commit: str) -> str:
    """The address that gives, or redirects to, the content of a file."""
    return hf_hub_url(hub.repo, name, revision=commit, endpoint=hub.api.endpoint)


def fetch_range(
    hub: Hub,
    name: str,
    commit: str,
    start: int,
    end: int,
    file: IO[bytes],
    received: Callable[[bytes], object],
) -> None:
    """Append bytes [start, end) of a file of the repository to `file`, telling `received` of each piece written.

    A fault that may pass is retried, going on after the last byte that arrived; attempts count anew whenever something
    arrived. Raises HubError.
    """
    position, attempt = start, 1

    def take(piece: bytes) -> None:
        nonlocal position
        file.write(piece)
        received(piece)
        position += len(piece)

    while position < end:
        before = position
        try:
            _stream(hub, name, commit, position, end, take)
            if position == end:
                return
            error: Exception = ConnectionError(f"the connection ended {end - position} bytes early")
        except Exception as failure:
            error = failure
        attempt = 1 if position > before else attempt + 1
        if not is_transient(error) or attempt > hub.backoff.attempts:
            translated = hub.translate(f"{hub.repo}: {name}", error)
            if translated is None:
                raise error
            raise translated from None
        hub.backoff.wait(attempt)


def _stream(hub: Hub, name: str, commit: str, start: int, end: int, take: Callable[[bytes], None]) -> None:
    headers: dict[str, Any] = build_hf_headers(token=hub.api.token, library_name="npuq")
    # Identity: a compressed body would make the range mean something else.
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    url = file_url(hub, name, commit)
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        offset = _offset(hub, name, response.status_code, response.headers.get("Content-Range"), start)
        left = end - start
        # As it arrives: pieces gathered up to a size would be lost with the connection.
        for piece in response.iter_bytes():
            # A server that ignores ranges starts at 0: what was not asked for passes by.
            skipped = min(offset, len(piece))
            offset -= skipped
            wanted = piece[skipped : skipped + left]
            left -= len(wanted)
            if wanted:
                take(wanted)
            if left == 0:
                return


def _offset(hub: Hub, name: str, status: int, content_range: str | None, start: int) -> int:
    """How many bytes of the answer come before `start`."""
    if status == 200:
        return start
    match = re.match(r"bytes (\d+)-", content_range or "")
    if status != 206 or match is None or int(match[1]) != start:
        raise HubError(f"{hub.repo}: {name}: asked for bytes from {start}, the hub answered {status} {content_range}")
    return 0


def feed(digest: Digest, path: Path) -> int:
    """Hash what is already in a file; returns its length."""
    length = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
            length += len(piece)
    return length
