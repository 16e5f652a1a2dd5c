"""The process behind a claim, and whether it lives: known at once on its own machine, and nowhere else."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import ConversionError
from ...inputs.forms import Keys, check_form, is_count, is_text
from ...inputs.printable import printable
from .share import Share

_FIELDS = {
    "host": is_text,
    "machine": is_text,
    "pid": is_count,
    "started": is_count,
    "rank": is_count,
    "size": is_count,
}
_FORM = Keys(_FIELDS, frozenset(_FIELDS))


@dataclass(frozen=True)
class Holder:
    """A process, by numbers that no later one shares.

    host: for messages. machine: host, boot and namespace of process numbers; empty where the system does not tell.
    started: when the process started, in ticks since that boot.
    """

    host: str
    machine: str
    pid: int
    started: int
    rank: int
    size: int

    @classmethod
    def here(cls, share: Share) -> Holder:
        """This process, which has a share."""
        host = printable(socket.gethostname())
        return cls(host, _machine(host), os.getpid(), _started(os.getpid()) or 0, share.rank, share.size)

    @classmethod
    def from_json(cls, value: Any) -> Holder:
        """The holder of `as_json`. Raises ConversionError for any other value."""
        check_form(value, _FORM, "the process of a journal", ConversionError)
        return cls(**{name: value[name] for name in _FIELDS})

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} (process {self.pid} on {printable(self.host)[:80]})"

    def lives(self) -> bool | None:
        """Whether the process runs; None for one of another machine."""
        if not self.machine or self.machine != _machine(printable(socket.gethostname())):
            return None
        return _started(self.pid) == self.started


def _machine(host: str) -> str:
    """A name of this machine since its boot, and of its process numbers; copies of a machine share all but the host."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{host} {boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    return ""


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot (proc(5), /proc/PID/stat); None for one that has ended."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # A killed process whose parent has not asked for its status does nothing any more.
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    return None
