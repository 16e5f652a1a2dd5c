"""The CPU's operators: the reference's results in bounded memory, over memory-mapped weights.

Integer matmuls run as float32 ones over slices of K short enough that every partial sum is a whole number below 2^24:
the same integers as the reference. int4 weights are unpacked one expert's matrix at a time, float weights are upcast a
few rows at a time, and attention scores are computed for a few queries at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...formats.schemes import Scheme
from ..attention.pools import LayerCache
from ..ranks.division import Division
from ..ranks.group import ALONE, Group
from . import Ops
from .handles import Activation, Experts, LinearPart, Quantized, own
from .reference import check_dtype
from .reference.cache import ReferenceCaches
from .reference.grouped_attention import ReferenceGroupedAttention
from .reference.latent_attention import ReferenceLatentAttention
from .reference.norms import ReferenceNorms
from .reference.products import ReferenceProducts, aligned, rows_of_experts
from .reference.rotary import ReferenceRotary
from .reference.routing import ReferenceRouting
from .reference.sparse_attention import ReferenceSparseAttention
from .reference.weights import PartsExperts, ReferenceWeights

# The largest |activation · weight|: activations quantized per token reach ±127, those with an offset −128.
_EXACT_K = {
    Scheme.W8A8: 2**24 // (127 * 128),
    Scheme.W8A8_STATIC: 2**24 // (128 * 128),
    Scheme.W4A8: 2**24 // (127 * 8),
}
_UPCAST_BYTES = 32 << 20
_SCORE_BYTES = 64 << 20
_MANY_HEADS = 128


class CpuProducts(ReferenceProducts):
    """Products without copies of mapped weights."""

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        groups = zip(rows_of_experts(x, group_list), own(experts, PartsExperts).linears, strict=True)
        return torch.cat([self.linear(rows, linear) for rows, linear in groups if _length(rows)])

    def _float_matmul(self, x: Tensor, part: LinearPart) -> Tensor:
        # Some rows at a time: the same ones whether this rank has all of them or not. See ReferenceProducts.
        weight, dtype = part.weight, self.dtype if part.weight.dtype == self.dtype else torch.float32
        outputs = part.output_division or Division(ALONE, (weight.shape[0],))
        total, own = outputs.total, outputs.own
        size = max(1, _UPCAST_BYTES // (4 * weight.shape[1]))
        x, products = aligned(x.to(dtype)), []
        for first in range(own.start // size * size, own.stop, size):
            some = range(first, min(first + size, total))
            kept = range(max(first, own.start), min(some.stop, own.stop))
            rows = weight[kept.start - own.start : kept.stop - own.start].to(dtype)
            if kept != some:
                rows, held = rows.new_zeros(len(some), weight.shape[1]), rows
                rows[kept.start - first : kept.stop - first] = held
            products.append(F.linear(x, aligned(rows))[:, kept.start - first : kept.stop - first])
        return torch.cat(products, dim=-1).to(self.dtype)

    def _integers(self, codes: Tensor, part: LinearPart) -> Tensor:
        if part.scheme is not Scheme.W4A8:
            return _integer_matmul(codes, part.weight, part.scheme)
        # Rows 2j and 2j+1 share bytes: one product for each nibble, then interleaved.
        halves = [_integer_matmul(codes, nibble, part.scheme) for nibble in _nibbles(part.weight)]
        return torch.stack(halves, dim=-1).flatten(-2)


class CpuLatentAttention(ReferenceLatentAttention):
    """Attention over a few queries at a time."""

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int | None
    ) -> tuple[Tensor, Tensor]:
        # Not by the number of heads: a rank that has some of them takes the same queries at a time.
        step = max(1, _SCORE_BYTES // (4 * _MANY_HEADS * max(1, key.shape[0])))
        outputs, lses = [], []
        for start in range(0, query.shape[0], step):
            some = query[start : start + step]
            seen = key.shape[0] if past is None else max(0, past + start + some.shape[0])
            first = None if past is None else past + start
            out, lse = super()._attention(some, key[:seen], value[:seen], scale, first)
            outputs.append(out)
            lses.append(lse)
        return torch.cat(outputs), torch.cat(lses)


class CpuSparseAttention(ReferenceSparseAttention):
    """Selection and attention for a few queries at a time."""

    def _select(self, query: Tensor, weights: Tensor, key: Tensor, past: int, count: int) -> Tensor:
        step = max(1, _SCORE_BYTES // (4 * query.shape[1] * key.shape[0]))
        starts = range(0, query.shape[0], step)
        select = super()._select
        return torch.cat([select(query[i : i + step], weights[i : i + step], key, past + i, count) for i in starts])

    def _attention_to(self, query: Tensor, cache: LayerCache, slots: Tensor, none: Tensor, scale: float) -> Tensor:
        held = slots.shape[1] * (_MANY_HEADS + 2 * query.shape[2])  # numbers for a query: scores, latents and keys
        parts = (each.split(max(1, _SCORE_BYTES // (4 * held))) for each in (query, slots, none))
        attend = super()._attention_to
        return torch.cat(
            [attend(some, cache, where, unused, scale) for some, where, unused in zip(*parts, strict=True)]
        )


class CpuGroupedAttention(ReferenceGroupedAttention):
    """Attention over a few queries of a head at a time."""

    def _head(self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int) -> Tensor:
        step = max(1, _SCORE_BYTES // (4 * max(1, key.shape[0])))
        starts, head = range(0, query.shape[0], step), super()._head
        return torch.cat([head(query[i : i + step], key, value, scale, past + i) for i in starts])


class CpuOps(Ops):
    """Plain torch on the CPU, without copies of mapped weights and without large temporaries."""

    name = "cpu"

    def __init__(self, dtype: torch.dtype = torch.float32, group: Group = ALONE):
        check_dtype(dtype)
        self.group = group
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.weights = ReferenceWeights()
        self.norms = ReferenceNorms(dtype)
        self.products = CpuProducts(dtype, self.norms)
        self.routing = ReferenceRouting(dtype, self.norms, self.products, group)
        self.caches = ReferenceCaches(dtype)
        self.rotary = ReferenceRotary(dtype)
        self.mla = CpuLatentAttention(dtype, self.weights, self.norms, self.products, self.rotary)
        self.sparse = CpuSparseAttention(dtype, self.weights, self.norms, self.products, self.rotary)
        self.gqa = CpuGroupedAttention(dtype, self.weights, self.norms, self.products, self.rotary)


def _length(x: Activation) -> int:
    return (x.codes if isinstance(x, Quantized) else x).shape[0]


def _nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack int8 `[N/2, K]` → the even and the odd rows, int8 `[N/2, K]` each, sign-extended."""
    return (packed << 4) >> 4, packed >> 4


def _integer_matmul(codes: Tensor, weight: Tensor, scheme: Scheme) -> Tensor:
    """Exact product of codes int8 `[M, K]` and weight int8 `[N, K]`: whole numbers `[M, N]`, float32 or int32."""
    step, size = _EXACT_K[scheme], codes.shape[1]
    if size <= step:
        return codes.float() @ weight.float().T
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int32)
    for start in range(0, size, step):
        columns = slice(start, start + step)
        total += (codes[:, columns].float() @ weight[:, columns].float().T).int()
    return total
