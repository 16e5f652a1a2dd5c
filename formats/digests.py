"""Digests of the bytes that jobs read and wrote; a continued run compares them.

XXH3 with 128 bits digests 20 to 50 GB/s, sha256 1 to 2: all bytes read and written are digested in one or two percent
of a conversion's time. The digest detects accidents: a flipped bit, another download, a page that was never written. It
is no defence against an attacker, who could write the journal as well as the output.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from .sources.weights import WeightSource

DIGEST_BYTES = 16
# Fits a core's own cache beside its other data.
_CHUNK = 1 << 20


class Digest:
    """An incremental digest."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: memoryview | bytes) -> None:
        self._state.update(data)

    def result(self) -> bytes:
        """The digest of all bytes so far: DIGEST_BYTES bytes."""
        return self._state.digest()


def combined(digests: Iterable[bytes]) -> bytes:
    """One digest of several, in their order."""
    return xxhash.xxh3_128_digest(b"".join(digests))


def source_digest(source: WeightSource, name: str) -> bytes:
    """Read and digest all stored bytes behind a weight's rows.

    Call it before the rows are read: when a file changes in between, every later digest differs from this one. In the
    other order the digest could be of bytes that were never used.
    """
    digest, buffer = Digest(), memoryview(bytearray(_CHUNK))
    for stored in source.weights[name].stored_names:
        nbytes = source.checkpoint.info(stored).nbytes
        for first in range(0, nbytes, _CHUNK):
            piece = buffer[: min(_CHUNK, nbytes - first)]
            source.checkpoint.read_bytes(stored, first, piece)
            digest.update(piece)
    return digest.result()
