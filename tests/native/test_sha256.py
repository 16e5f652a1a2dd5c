"""SHA-256 of one stream and of two at once: hashlib's digests, whatever the lengths, the cuts and the addresses."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npuq.convert.write import sha256
from npuq.convert.write.sha256 import NativeDigest, new_digest, update_two

pytestmark = pytest.mark.skipif(not sha256.two_at_once(), reason="no library, or no instructions for SHA-256 here")

# Published by NIST: examples of FIPS 180-4, and a million times "a".
EXAMPLES = {
    b"": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    b"abc": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq": (
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"
    ),
    b"a" * 1_000_000: "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0",
}


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bytes(n: int, seed: int, offset: int = 0) -> memoryview:
    """Random bytes that begin anywhere in memory."""
    return memoryview(random.Random(seed).randbytes(n + offset))[offset:]


def _cuts(data: memoryview, positions: list[int]) -> list[memoryview]:
    edges = [0, *sorted(position % (len(data) + 1) for position in positions), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("message", EXAMPLES, ids=len)
def test_published_examples(message: bytes) -> None:
    one, two, other = new_digest(), new_digest(), new_digest()
    assert isinstance(one, NativeDigest)
    one.update(memoryview(message))
    update_two(two, memoryview(message), other, memoryview(message))
    assert one.hexdigest() == two.hexdigest() == other.hexdigest() == EXAMPLES[message]


def test_all_short_lengths() -> None:
    """Every way to end a block, on both sides; the digest can be asked for and the stream goes on."""
    for n in range(301):
        first, second, data, more = new_digest(), new_digest(), _bytes(n, n, n % 7), _bytes(300 - n, ~n, n % 5)
        update_two(first, data, second, more)
        assert (first.hexdigest(), second.hexdigest()) == (_sum(data), _sum(more))
        first.update(more)
        assert first.hexdigest() == _sum(bytes(data) + bytes(more))


def test_every_place_to_cut() -> None:
    data, more = _bytes(200, 1), _bytes(300, 2, 3)
    for cut in range(201):
        first, second = new_digest(), new_digest()
        update_two(first, data[:cut], second, more[cut:])
        update_two(second, more[:0], first, data[cut:])
        assert (first.hexdigest(), second.hexdigest()) == (_sum(data), _sum(more[cut:]))


@given(
    st.integers(0, 3000), st.integers(0, 3000), st.lists(st.integers(0)), st.lists(st.integers(0)), st.integers(0, 64)
)
def test_two_streams_in_any_pieces(n: int, m: int, cuts: list[int], others: list[int], offset: int) -> None:
    """Pieces of both side by side; what one has more, it gets alone."""
    data, more = _bytes(n, n, offset), _bytes(m, ~m, offset // 3)
    first, second = new_digest(), new_digest()
    pieces, further = _cuts(data, cuts), _cuts(more, others)
    for piece, other in zip(pieces, further, strict=False):
        update_two(first, piece, second, other)
    for digest, rest in ((first, pieces[len(further) :]), (second, further[len(pieces) :])):
        for piece in rest:
            digest.update(piece)
    assert (first.hexdigest(), second.hexdigest()) == (_sum(data), _sum(more))


def test_megabytes() -> None:
    data, more = _bytes(5_000_001, 1, 1), _bytes(3_000_017, 2, 2)
    first, second = new_digest(), new_digest()
    update_two(first, data, second, more)
    assert (first.hexdigest(), second.hexdigest()) == (_sum(data), _sum(more))


def test_a_length_of_more_than_32_bits() -> None:
    """The count of bits at the end of the last block. 4 GB take seconds: so a stream that is told that it had them."""
    digest, data = new_digest(), _bytes(100, 1)
    assert isinstance(digest, NativeDigest)
    digest.update(data[:64])
    state = list(digest.stream.state)
    digest.stream.nbytes += 1 << 32
    digest.update(data[64:])
    block = bytes(data[64:]) + b"\x80"
    block += bytes(56 - len(block)) + (8 * ((1 << 32) + 100)).to_bytes(8, "big")
    assert digest.hexdigest() == "".join(f"{word:08x}" for word in _compressed(state, block))


def _compressed(state: list[int], block: bytes) -> list[int]:
    """FIPS 180-4, 6.2.2, word by word."""
    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    constants = [_cube_root_fraction(prime) for prime in primes]
    words = [int.from_bytes(block[i : i + 4], "big") for i in range(0, 64, 4)]
    for t in range(16, 64):
        left, right = words[t - 15], words[t - 2]
        small = _turned(left, 7) ^ _turned(left, 18) ^ left >> 3
        words.append(
            (words[t - 16] + small + words[t - 7] + (_turned(right, 17) ^ _turned(right, 19) ^ right >> 10)) % 2**32
        )
    a, b, c, d, e, f, g, h = state
    for constant, word in zip(constants, words, strict=True):
        first = h + (_turned(e, 6) ^ _turned(e, 11) ^ _turned(e, 25)) + ((e & f) ^ (~e & g)) + constant + word
        second = (_turned(a, 2) ^ _turned(a, 13) ^ _turned(a, 22)) + ((a & b) ^ (a & c) ^ (b & c))
        a, b, c, d, e, f, g, h = (first + second) % 2**32, a, b, c, (d + first) % 2**32, e, f, g
    return [(old + new) % 2**32 for old, new in zip(state, (a, b, c, d, e, f, g, h), strict=True)]


def _turned(word: int, by: int) -> int:
    return (word >> by | word << (32 - by)) % 2**32


def _cube_root_fraction(prime: int) -> int:
    """The first 32 bits of the fractional part of a prime's cube root."""
    low, high = 0, prime << 32
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**3 <= prime << 96 else (low, middle)
    return low % 2**32


@pytest.mark.parametrize("found", [None, SimpleNamespace(npuq_sha256_usable=lambda: 0)], ids=["no library", "old CPU"])
def test_without_the_instructions_hashlib_does_the_work(monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    monkeypatch.setattr(sha256, "library", lambda: found)
    monkeypatch.setattr(sha256, "_native", sha256._native.__wrapped__)  # without what it remembers
    assert not sha256.two_at_once()
    first, second = new_digest(), new_digest()
    update_two(first, memoryview(b"abc"), second, memoryview(b""))
    assert (first.hexdigest(), second.hexdigest()) == (EXAMPLES[b"abc"], EXAMPLES[b""])
    assert not isinstance(first, NativeDigest)
