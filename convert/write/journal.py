"""The journal of a conversion: the jobs that are on disk, so that a killed run continues.

A text file of JSON lines, each with a checksum of its own. The first has the identity of the conversion. Every later
one has the stamps of the source files; or jobs (their error statistics, and digests of the bytes that they read and
wrote) or shard hashes that were synced to disk before the line was written; or jobs and hashes that were lost since. A
line that a crash tore or a disk damaged ends the journal: everything after it is done again.

Of several processes each writes a journal of its own, new at each start (`ranks/run.py`). Its first line also names the
process; a line lists the shards that the journal speaks for from there on, and the last line says that the process is
done with them.
"""

from __future__ import annotations

import fcntl
import math
import os
import stat
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...errors import ConversionError
from ...formats.digests import DIGEST_BYTES
from ...formats.output_files import sync_directory
from ...inputs.files import FileStamp
from ...inputs.json_text import parse_object
from ...inputs.names import Sha256
from ...quant.weight_error import ErrorSums
from .checked_lines import DamagedLineError, checked_line, line_content

JOURNAL_VERSION = 2
# DeepSeek-V3's 46183 jobs take 5.3 MB, 115 bytes each.
_MOST_BYTES: Final = 1 << 30
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # follow no link, and do not wait for a pipe


@dataclass(frozen=True)
class JobEntry:
    """The journal's entry of a finished job: its statistics, and the digests of all bytes that it read and wrote."""

    stats: ErrorSums
    read: bytes
    written: bytes


@dataclass
class Record:
    """The content of a journal: finished jobs by index, sha256 of finished shards, and the stamps of the source files
    in their order, as they were when those jobs read them (empty: not recorded).

    Of a journal among several: `shards` are those that it speaks for; `ended`: its process is done with them.
    """

    jobs: dict[int, JobEntry] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    sources: tuple[FileStamp, ...] = ()
    shards: set[int] = field(default_factory=set)
    ended: bool = False


@dataclass(frozen=True)
class Beginning:
    """The first line of a journal: the identity of the conversion, and a description of the process, if it is one of
    several."""

    identity: Mapping[str, str]
    process: Any = None


class Journal:
    """An open journal, locked against a second conversion into the same directory."""

    def __init__(self, path: Path, descriptor: int, identity: Mapping[str, str], record: Record):
        self.path = path
        self.identity = dict(identity)
        self.record = record
        self._descriptor = descriptor
        self._writing = threading.Lock()
        self._refusal: ConversionError | None = None
        # The content of the lines; the record may have lost some of it.
        self._told_jobs, self._told_hashes = set(record.jobs), set(record.hashes)
        self._told_sources = record.sources

    @staticmethod
    def first_line(identity: Mapping[str, str], process: Mapping[str, Any] | None = None) -> bytes:
        """The content of a new journal, its first line. process: a description of this one among several."""
        told = {} if process is None else {"process": dict(process)}
        return checked_line({"npuq_conversion": JOURNAL_VERSION, "identity": dict(identity), **told})

    @classmethod
    def create(cls, path: Path, identity: Mapping[str, str], process: Mapping[str, Any]) -> Journal:
        """Make the journal of one process among several; on stable storage on return. Raises OSError."""
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | _FLAGS, 0o666)
        try:
            journal = cls(path, descriptor, identity, Record())
            journal._write(cls.first_line(identity, process))
            sync_directory(path.parent)
        except BaseException:
            os.close(descriptor)
            raise
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open and lock an existing journal; drop its first damaged line and all lines after it.

        Raises ConversionError when it is not a journal of this version, or another process holds it; OSError when it
        cannot be opened.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | _FLAGS)
        try:
            _lock(descriptor, path, fcntl.LOCK_EX)
            beginning, record, intact = _replay(path, descriptor)
            os.ftruncate(descriptor, intact)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, beginning.identity, record)

    @staticmethod
    def look(path: Path) -> tuple[Beginning, Record]:
        """Read a journal without changing it. Raises as `open`."""
        descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            _lock(descriptor, path, fcntl.LOCK_SH)
            beginning, record, _ = _replay(path, descriptor)
        finally:
            os.close(descriptor)
        return beginning, record

    def append(self, jobs: Mapping[int, JobEntry], hashes: Mapping[int, str]) -> None:
        """Add finished jobs and shard hashes; on stable storage on return. The shards must be synced before.

        Raises OSError, and the error of `refuse`.
        """
        self._write(_told(jobs, hashes))
        self.record.jobs.update(jobs)
        self.record.hashes.update(hashes)
        self._told_jobs.update(jobs)
        self._told_hashes.update(hashes)

    def settle(self, sources: Sequence[FileStamp], shards: Iterable[int] = ()) -> None:
        """Write down how the record has changed: jobs and hashes removed from it or taken over into it, and the stamps
        of the files that all its jobs were read from; on stable storage on return.

        Call it before any lost job is made again: a new file soon looks like the lost one. shards: those that this
        journal speaks for from now on. Raises as `append`.
        """
        record = self.record
        jobs, hashes = sorted(self._told_jobs - record.jobs.keys()), sorted(self._told_hashes - record.hashes.keys())
        lines = checked_line({"lost_jobs": jobs, "lost_hashes": hashes}) if jobs or hashes else b""
        if tuple(sources) != self._told_sources:
            lines += checked_line({"sources": [list(stamp) for stamp in sources]})
        lines += _told(
            {index: entry for index, entry in record.jobs.items() if index not in self._told_jobs},
            {shard: digest for shard, digest in record.hashes.items() if shard not in self._told_hashes},
        )
        if spoken := sorted(shards):
            # Last: a torn line before it leaves these shards to the journal that spoke for them.
            lines += checked_line({"shards": spoken})
        if lines:
            self._write(lines)
        record.sources = self._told_sources = tuple(sources)
        record.shards.update(spoken)
        self._told_jobs, self._told_hashes = set(record.jobs), set(record.hashes)

    def end(self) -> None:
        """Write down that this process is done with its shards; nothing after `refuse`, and no line follows."""
        if self._refusal is None:
            self._write(checked_line({"ended": True}))
            self.refuse(ConversionError(f"{self.path}: has ended"))

    def refuse(self, error: ConversionError) -> None:
        """Let every later line fail with an error."""
        self._refusal = self._refusal or error

    def touch(self) -> int:
        """Set the time of the file, and return it: the file system's own time now, in ns. Raises OSError."""
        os.utime(self._descriptor)
        return os.fstat(self._descriptor).st_mtime_ns

    def _write(self, lines: bytes) -> None:
        with self._writing:
            if self._refusal is not None:
                raise self._refusal
            rest = memoryview(lines)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close and unlock; the file remains."""
        os.close(self._descriptor)


def _told(jobs: Mapping[int, JobEntry], hashes: Mapping[int, str]) -> bytes:
    """The lines of jobs and shard hashes; none of nothing."""
    lines = b""
    if jobs:
        # Python's text of a float reads back exactly.
        entries = [
            [index, entry.stats.squared_error, entry.stats.squared_norm, entry.read.hex(), entry.written.hex()]
            for index, entry in jobs.items()
        ]
        lines += checked_line({"jobs": entries})
    if hashes:
        lines += checked_line({"hashes": list(hashes.items())})
    return lines


def _lock(descriptor: int, path: Path, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(f"{path.parent.parent}: another npuq is converting into it right now") from None
    except OSError:
        # Some network file systems have no locks. Converting there is still possible, only unguarded.
        return


def _replay(path: Path, descriptor: int) -> tuple[Beginning, Record, int]:
    """The first line, the record, and the length in bytes of the intact part."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        raise ConversionError(f"{path}: not a conversion journal; choose another output directory")
    with open(descriptor, "rb", closefd=False) as file:
        lines = file.read(_MOST_BYTES).split(b"\n")[:-1]  # the rest behind the last newline is torn or empty
    beginning = _beginning(path, lines[0] if lines else b"")
    record, intact = Record(), len(lines[0]) + 1
    for line in lines[1:]:
        try:
            _apply(line_content(line), record)
        except (DamagedLineError, KeyError, TypeError, ValueError):
            break
        intact += len(line) + 1
    return beginning, record, intact


def _beginning(path: Path, line: bytes) -> Beginning:
    """The content of the first line. Raises ConversionError for another version's line, or one of another kind."""
    none = f"{path}: not a conversion journal, or a damaged one; choose another output directory, or remove this one"
    try:
        # The checksum is checked later: versions without checksums had this key too.
        version = parse_object(line, str(path), DamagedLineError)["npuq_conversion"]
    except (DamagedLineError, KeyError):
        raise ConversionError(none) from None
    if version != JOURNAL_VERSION:
        raise ConversionError(
            f"{path}: written by another version of npuq; finish with that version, or choose another output directory"
        )
    try:
        content = line_content(line)
        identity = content["identity"]
    except (DamagedLineError, KeyError):
        raise ConversionError(none) from None
    if not isinstance(identity, dict) or not all(isinstance(value, str) for value in identity.values()):
        raise ConversionError(none)
    return Beginning(identity, content.get("process"))


def _apply(content: Mapping[str, Any], record: Record) -> None:
    """Add the content of a line to a record. Raises KeyError, TypeError or ValueError for invalid content."""
    jobs = dict(map(_entry, content.get("jobs", ())))
    hashes = {_number(shard): Sha256(digest) for shard, digest in content.get("hashes", ())}
    lost = [list(map(_number, content.get(key, ()))) for key in ("lost_jobs", "lost_hashes")]
    sources = [FileStamp(*map(_whole, stamp)) for stamp in content.get("sources", ())]
    shards = set(map(_number, content.get("shards", ())))
    record.jobs.update(jobs)
    record.hashes.update(hashes)
    for index in lost[0]:
        record.jobs.pop(index, None)
    for shard in lost[1]:
        record.hashes.pop(shard, None)
    record.shards.update(shards)
    record.ended = record.ended or "ended" in content
    if "sources" in content:
        record.sources = tuple(sources)


def _entry(fields: Any) -> tuple[int, JobEntry]:
    index, squared_error, squared_norm, read, written = fields
    return _number(index), JobEntry(ErrorSums(_sum(squared_error), _sum(squared_norm)), _digest(read), _digest(written))


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def _number(value: Any) -> int:
    if _whole(value) < 0:
        raise ValueError(f"{value!r} is no count")
    return int(value)


def _sum(value: Any) -> float:
    if type(value) is not float or not 0 <= value < math.inf:
        raise ValueError(f"{value!r} is no sum of squares")
    return value


def _digest(value: Any) -> bytes:
    digest = bytes.fromhex(value)
    if len(digest) != DIGEST_BYTES:
        raise ValueError(f"{value!r} is no digest")
    return digest
