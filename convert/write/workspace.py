"""Memory that a thread reuses for every chunk: fresh memory costs a page fault and a zeroed page for each 4 KB.

The bytes of a job stay in it for the hashing thread, until their owner needs the memory again (`Written`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of codes kept for hashing for each value of a chunk, and the number of jobs: while one is made, one may wait for
# the neighbour of its shard, and one be hashed. With two values as stored (4 bytes each at most) that is 32 of the
# bytes that `memory.BYTES_PER_ELEMENT` allows.
_KEPT_BYTES_PER_ELEMENT = 8
_KEPT_JOBS = 3


class Written:
    """Bytes [start, end) of a shard as consecutive pieces of memory, until their owner takes the memory back.

    Two threads share it: the owner of the memory, and the one that hashes it.
    """

    def __init__(self, start: int, pieces: Sequence[memoryview]):
        self.start = start
        self.end = start + sum(piece.nbytes for piece in pieces)
        self._pieces = tuple(pieces)
        self._lock = threading.Lock()

    @property
    def taken_back(self) -> bool:
        """True once the memory is its owner's again."""
        return not self._pieces

    def take_back(self) -> None:
        """Return the memory to its owner, once no thread is within `held`."""
        with self._lock:
            self._pieces = ()

    @contextmanager
    def held(self, position: int) -> Iterator[memoryview | None]:
        """Bytes from `position` of the shard on to the end of a piece, valid meanwhile; None if taken back."""
        with self._lock:
            yield self._from(position)

    def _from(self, position: int) -> memoryview | None:
        start = self.start
        for piece in self._pieces:
            if position < start + piece.nbytes:
                return piece[position - start :]
            start += piece.nbytes
        return None


@dataclass
class _Codes:
    """Memory for the codes of one job, and its present reader."""

    memory: NDArray[np.int8]
    lent: Written | None = None

    @property
    def free(self) -> bool:
        return self.lent is None or self.lent.taken_back


@dataclass
class Workspace:
    """One thread's memory for the bytes that it reads and the codes that it makes, as large as the largest request for
    each.

    `chunk_elements`: the values of a weight that a thread may hold at a time.
    """

    chunk_elements: int
    _read: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    _codes: list[_Codes] = field(default_factory=list)  # in the order of use, the latest last

    @property
    def kept_bytes(self) -> int:
        """The bytes of codes of a job that a thread may keep."""
        return _KEPT_BYTES_PER_ELEMENT * self.chunk_elements

    def release(self) -> None:
        """Free the memory, lent or not."""
        self._read = np.empty(0, np.uint8)
        for codes in self._codes:
            _take_back(codes)
        self._codes.clear()

    def read(self, nbytes: int) -> NDArray[np.uint8]:
        """uint8 [nbytes], in the memory of the call before."""
        if self._read.size < nbytes:
            self._read = np.empty(nbytes, np.uint8)
        return self._read[:nbytes]

    def codes(self, rows: int, columns: int) -> NDArray[np.int8]:
        """int8 [rows, columns], in reused memory that is not lent; without any, the earliest loan is taken back."""
        codes = next((codes for codes in self._codes if codes.free), None)
        if codes is None and len(self._codes) < _KEPT_JOBS:
            codes = _Codes(np.empty(0, np.int8))
        elif codes is None:
            codes = self._codes[0]
        _take_back(codes)
        if codes.memory.size < rows * columns:
            codes.memory = np.empty(rows * columns, np.int8)
        self._codes = [*(other for other in self._codes if other is not codes), codes]
        return codes.memory[: rows * columns].reshape(rows, columns)

    def lend(self, written: Written) -> None:
        """Lend the latest codes to `written`: they stay unchanged until it is taken back."""
        self._codes[-1].lent = written


def _take_back(codes: _Codes) -> None:
    if codes.lent is not None:
        codes.lent.take_back()
        codes.lent = None
