"""What a job wrote into its shard, in the memory that it was written from, for as long as its thread can spare that."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Written:
    """Bytes [start, end) of a shard as pieces of memory, one after the other, until somebody takes the memory back.

    Two threads share it: the one whose memory it is, and one that hashes it.
    """

    def __init__(self, start: int, pieces: Sequence[memoryview]):
        self.start = start
        self.end = start + sum(piece.nbytes for piece in pieces)
        self._pieces = tuple(pieces)
        self._lock = threading.Lock()

    @property
    def taken_back(self) -> bool:
        """Whether the memory is its owner's again."""
        return not self._pieces

    def take_back(self) -> None:
        """Give the memory to its owner, once nobody is within `held`."""
        with self._lock:
            self._pieces = ()

    @contextmanager
    def held(self, position: int) -> Iterator[memoryview | None]:
        """Bytes from `position` of the shard on to the end of a piece, which stay meanwhile; None if taken back."""
        with self._lock:
            yield self._from(position)

    def _from(self, position: int) -> memoryview | None:
        start = self.start
        for piece in self._pieces:
            if position < start + piece.nbytes:
                return piece[position - start :]
            start += piece.nbytes
        return None
