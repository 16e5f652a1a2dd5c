"""Faults on demand: what a connection or a hub can do wrong, and when."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Goes off for requests whose "METHOD /path" contains `pattern` (a regular expression): skips the first `after`
    of them, then hits `times`.

    status: answer with it (and `headers`, `code` as X-Error-Code, `said` as X-Error-Message) instead of doing
    anything. reset_before: close the connection without an answer. reset_after: let so many bytes of the body (of an
    upload, or of the answer) pass, then reset. lose_response: do what was asked, then reset instead of answering.
    corrupt: flip a bit of the answer's body at this offset. bytes_per_second: slow the body, of an upload or of the
    answer. truncate: end the answer's body so many bytes early. longer: send so many bytes more than there are.
    endless: never end the body. sent_headers: of the answer, whatever they should be. body: send this instead.
    """

    pattern: str
    after: int = 0
    times: int = 1
    status: int | None = None
    code: str | None = None
    said: str = "a fault on demand"
    headers: dict[str, str] = field(default_factory=dict)
    reset_before: bool = False
    reset_after: int | None = None
    lose_response: bool = False
    corrupt: int | None = None
    bytes_per_second: int | None = None
    truncate: int | None = None
    longer: int = 0
    endless: bool = False
    sent_headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


class Faults:
    """The faults that are armed, and how often each has been met."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Fault] = []
        self._seen: dict[int, int] = {}
        self.hits = 0

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._armed.append(fault)

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()
            self._seen.clear()
            self.hits = 0

    def meet(self, request: str) -> Fault | None:
        """The fault that this request runs into."""
        with self._lock:
            for fault in self._armed:
                if re.search(fault.pattern, request) is None:
                    continue
                seen = self._seen[id(fault)] = self._seen.get(id(fault), 0) + 1
                if fault.after < seen <= fault.after + fault.times:
                    self.hits += 1
                    return fault
        return None
