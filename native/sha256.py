"""Incremental SHA-256 of two streams at once, in little more time than one, on CPUs with SHA instructions.

One stream mostly waits for its own previous round (`native/common/sha256.c`), and no implementation of a single stream
is faster than hashlib's.
"""

from __future__ import annotations

import ctypes
import hashlib
from ctypes import c_int64, c_uint8, c_void_p
from functools import cache
from typing import Protocol

import numpy as np

from .library import Sha256, library


class Digest(Protocol):
    """The part of hashlib's interface that npuq uses."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


class NativeDigest:
    """A SHA-256 that `update_two` can update together with another."""

    def __init__(self, found: ctypes.CDLL):
        self.library = found
        self.stream = Sha256()
        found.npuq_sha256_begin(ctypes.byref(self.stream))

    def update(self, data: memoryview, /) -> None:
        """Hash more bytes, of any alignment."""
        self.library.npuq_sha256_add(ctypes.byref(self.stream), _address(data), data.nbytes)

    def hexdigest(self) -> str:
        """The digest of all bytes so far, in hexadecimal."""
        digest = (c_uint8 * 32)()
        self.library.npuq_sha256_end(ctypes.byref(self.stream), digest)
        return bytes(digest).hex()


def two_at_once() -> bool:
    """True where `update_two` is faster than two updates."""
    return _native() is not None


def new_digest() -> Digest:
    """Begin a digest."""
    found = _native()
    return hashlib.sha256() if found is None else NativeDigest(found)


def update_two(first: Digest, data: memoryview, second: Digest, more: memoryview) -> None:
    """Update two different digests, each with its own bytes; the gain is largest for equal lengths."""
    if not (isinstance(first, NativeDigest) and isinstance(second, NativeDigest)):
        first.update(data)
        second.update(more)
        return
    streams = (c_void_p * 2)(ctypes.addressof(first.stream), ctypes.addressof(second.stream))
    addresses = (c_void_p * 2)(_address(data), _address(more))
    first.library.npuq_sha256_add_two(streams, addresses, (c_int64 * 2)(data.nbytes, more.nbytes))


@cache
def _native() -> ctypes.CDLL | None:
    found = library()
    return found if found is not None and found.npuq_sha256_usable() else None


def _address(data: memoryview) -> int:
    # ctypes itself refuses memory that is read-only.
    return int(np.frombuffer(data, np.uint8).ctypes.data) if data.nbytes else 0
