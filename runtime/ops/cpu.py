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
from ..ranks.group import ALONE, Group
from . import Ops
from .handles import Activation, Experts, LinearPart, Quantized, own
from .reference import check_dtype
from .reference.cache import ReferenceCaches
from .reference.latent_attention import ReferenceLatentAttention
from .reference.norms import ReferenceNorms
from .reference.products import ReferenceProducts, rows_of_experts
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


class CpuProducts(ReferenceProducts):
    """Products without copies of mapped weights."""

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        groups = zip(rows_of_experts(x, group_list), own(experts, PartsExperts).linears, strict=True)
        return torch.cat([self.linear(rows, linear) for rows, linear in groups if _length(rows)])

    def _float_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        if weight.dtype == self.dtype:
            return F.linear(x, weight)
        rows = max(1, _UPCAST_BYTES // (4 * weight.shape[1]))
        x = x.float()
        return torch.cat([F.linear(x, part.float()) for part in weight.split(rows)], dim=-1).to(self.dtype)

    def _quant_matmul(self, rows: Quantized, part: LinearPart) -> Tensor:
        assert part.scale is not None
        if part.scheme is Scheme.W4A8:
            # Rows 2j and 2j+1 share bytes: one product for each nibble, then interleaved.
            halves = [_integer_matmul(rows.codes, nibble, part.scheme) for nibble in _nibbles(part.weight)]
            accumulator = torch.stack(halves, dim=-1).flatten(-2)
        else:
            accumulator = _integer_matmul(rows.codes, part.weight, part.scheme)
        return accumulator.float().mul_(part.scale.T).mul_(rows.scale[:, None]).to(self.dtype)

    def static_matmul(self, codes: Tensor, part: LinearPart) -> Tensor:
        assert part.static is not None
        accumulator = _integer_matmul(codes, part.weight, part.scheme).int() + part.static.quant_bias
        return accumulator.float().mul_(part.static.deq_scale).to(self.dtype)


class CpuLatentAttention(ReferenceLatentAttention):
    """Attention over a few queries at a time."""

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int | None
    ) -> tuple[Tensor, Tensor]:
        step = max(1, _SCORE_BYTES // (4 * query.shape[1] * max(1, key.shape[0])))
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
        held = slots.shape[1] * (query.shape[1] + 2 * query.shape[2])  # numbers for a query: scores, latents and keys
        parts = (each.split(max(1, _SCORE_BYTES // (4 * held))) for each in (query, slots, none))
        attend = super()._attention_to
        return torch.cat(
            [attend(some, cache, where, unused, scale) for some, where, unused in zip(*parts, strict=True)]
        )


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
