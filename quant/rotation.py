"""Orthogonal rotations that spread a vector's energy evenly over its channels: Hadamard matrices with random signs.

A rotation of size n is Q = diag(signs) · (P ⊗ S) where S is Sylvester's Hadamard matrix of the largest power of two
that fits, and P covers the odd part of n: a Hadamard matrix by one of Paley's two constructions where there is one
(order 12 for 1536 = 12 · 128, 20 for 5120, 28 for 7168), else the orthonormal discrete cosine transform of that size.
The signs come from a hash of the size, so that the same checkpoint is always rotated the same way.

(Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024; Paley, "On orthogonal matrices", 1933.)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import TYPE_CHECKING

from ..deferred import torch

if TYPE_CHECKING:
    from torch import Tensor

# Two Sylvester factors of up to this order each, instead of one large one: n · 2^(k/2) products instead of n · 2^k.
_LARGEST_FACTOR = 128
_PRODUCT_ROWS = 64


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix Q [size, size], applied without being formed. Use `rotation(size)`."""

    signs: Tensor  # float64 [size], ±1
    factors: tuple[Tensor, ...]  # orthogonal matrices, float64; Q = diag(signs) · (factors[0] ⊗ factors[1] ⊗ …)

    @property
    def size(self) -> int:
        return self.signs.shape[0]

    def rows(self, x: Tensor) -> Tensor:
        """x · Q in float64, along a last dimension of one or more vectors of `size` channels."""
        shape = x.shape
        x = x.to(torch.float64).reshape(-1, self.size) * self.signs
        for factor in reversed(self.factors):
            # The last axis is multiplied and brought to the front: after all of them, the axes are in order again.
            product = _multiply(x.reshape(-1, factor.shape[0]), factor)
            x = product.view(x.shape[0], -1, factor.shape[0]).transpose(1, 2).reshape(x.shape[0], -1)
        return x.reshape(shape)

    def columns(self, x: Tensor) -> Tensor:
        """Qᵀ · x in float64 for x [k · size, …], every `size` rows by themselves: rotates a linear's outputs."""
        flat = x.reshape(x.shape[0], -1)
        return self.rows(flat.T).T.reshape(x.shape).contiguous()

    def matrix(self) -> Tensor:
        """Form Q, float64 [size, size]."""
        return self.rows(torch.eye(self.size, dtype=torch.float64))


def _multiply(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor as products of one fixed shape: in one large product a row's last bits may depend on the number of
    other rows."""
    count, order = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 0, -count % _PRODUCT_ROWS)).view(-1, _PRODUCT_ROWS, order)
    return torch.bmm(padded, factor.expand(padded.shape[0], -1, -1)).view(-1, order)[:count]


@lru_cache(maxsize=16)
def rotation(size: int) -> Rotation:
    """The rotation of vectors of `size` channels, identical at every call and on every machine."""
    if size < 1:
        raise ValueError(f"no rotation of size {size}")
    first = _first_factor(size)
    rest = size // first.shape[0]
    bits = rest.bit_length() - 1
    left = 1 << (bits // 2)
    powers = [left, rest // left] if rest > _LARGEST_FACTOR else [rest]
    factors = (first, *(_sylvester(power) for power in powers))
    return Rotation(_signs(size), tuple(factor for factor in factors if factor.shape[0] > 1))


def _first_factor(size: int) -> Tensor:
    """The smallest factor that covers the odd part of `size`."""
    odd = size // (size & -size)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    order = 2 * odd  # 4 divides every Hadamard order above 2
    while order * 2 <= size and size % (order * 2) == 0:
        order *= 2
        found = _paley(order)
        if found is not None:
            return found / order**0.5
    return _cosines(odd)


def _paley(order: int) -> Tensor | None:
    """A Hadamard matrix of ±1 by Paley's constructions over a prime field; None where they give none."""
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        skew = _bordered(q, -1)
        return torch.eye(order, dtype=torch.float64) + skew
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        symmetric = _bordered(q, 1)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), corner)
    return None


def _bordered(q: int, sign: int) -> Tensor:
    """The conference matrix of order q + 1: Jacobsthal's χ(i − j) within a border of ones (times `sign` below)."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    index = (torch.arange(q)[:, None] - torch.arange(q)) % q
    result = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    result[0, 1:], result[1:, 0], result[1:, 1:] = 1.0, float(sign), character[index]
    return result


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


def _sylvester(order: int) -> Tensor:
    """The Hadamard matrix of a power of two, orthonormal."""
    result = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while result.shape[0] < order:
        result = torch.kron(result, step)
    return result / order**0.5


def _cosines(order: int) -> Tensor:
    """The orthonormal DCT-II: entries of at most √(2 / order), where a Hadamard matrix would have √(1 / order)."""
    index = torch.arange(order, dtype=torch.float64)
    table = torch.cos(torch.pi / order * (index[:, None] + 0.5) * index) * (2 / order) ** 0.5
    table[:, 0] /= 2**0.5
    return table


def _signs(size: int) -> Tensor:
    digest = hashlib.shake_128(f"npuq rotation {size}".encode()).digest(-(-size // 8))
    bits = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    each = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[:size]
    return each.to(torch.float64) * 2 - 1
