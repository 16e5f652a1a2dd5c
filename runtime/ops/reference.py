"""The specification: every operator in plain torch, as the NPU computes it, integer for integer where it is integer.

Short before fast: weights are unpacked and upcast at each use. Rounding rules are those of the operators' kernels; the
three quantizers differ on purpose (half-even of x·(127/m), half-away of x/(m/127), half-even of y/(m/127)).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendError
from ...formats.int4 import unpack_int4
from ...formats.kv_cache import INT8_CHANNELS, cached_latent, latent_codes
from ...formats.schemes import Scheme
from ...formats.static_w8a8 import InputScale
from ..layout import CHANNELS, read_nz, write_nz
from . import Activation, Decode, Experts, Gating, LayerCache, Linear, LinearPart, Ops, PrefixSegment, Quantized, Router

COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PartsLinear:
    """A handle that keeps its parts as they are stored, memory-mapped, side by side along the outputs."""

    parts: tuple[LinearPart, ...]

    @property
    def scheme(self) -> Scheme:
        return self.parts[0].scheme


class ReferenceOps(Ops):
    """Plain torch on the CPU."""

    name = "reference"

    def __init__(self, dtype: torch.dtype = torch.float32):
        if dtype not in COMPUTE_DTYPES:
            raise BackendError(f"compute dtype {dtype} is not one of float32, bfloat16 and float16")
        self.dtype = dtype
        self.device = torch.device("cpu")

    # ---- at load ---------------------------------------------------------------------------------------------------

    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        return PartsLinear(tuple(LinearPart("", Scheme.FLOAT, weight) for weight in weights))

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return PartsLinear(tuple(parts))

    static_linear = w8a8_linear

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return tuple(PartsLinear(tuple(parts)) for parts in experts)

    w8a8_experts = float_experts
    w4a8_experts = float_experts

    def router(self, weight: Tensor) -> Router:
        return weight

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    def new_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_lora_rank: int,
        rope_dim: int,
        latent_scales: Sequence[Tensor] | None = None,
    ) -> tuple[LayerCache, ...]:
        def pool(channels: int, tile: int, dtype: torch.dtype) -> Tensor:
            if channels % tile:
                raise BackendError(
                    f"the NZ layout keeps {tile} channels of {dtype} together; {channels} are no multiple"
                )
            shape = (num_blocks, channels // tile, block_size, tile)
            # numpy's zeros come from calloc: the pages of blocks that are never used are never touched.
            return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)

        int8 = latent_scales is not None
        scales: Sequence[Tensor | None] = latent_scales or [None] * num_layers
        latent = (INT8_CHANNELS, torch.int8) if int8 else (CHANNELS, self.dtype)
        return tuple(
            LayerCache(pool(kv_lora_rank, *latent), pool(rope_dim, CHANNELS, self.dtype), block_size, scale)
            for scale in scales
        )

    # ---- norms and activations -------------------------------------------------------------------------------------

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return table[token_ids].to(self.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        return (_normalise(x.float(), eps) * gamma.float()).to(self.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x.float() + residual.float()
        rounded = _normalise(total, eps).to(self.dtype).float()
        return (rounded * gamma.float()).to(self.dtype), total.to(self.dtype)

    def swiglu(self, x: Tensor) -> Tensor:
        return _swiglu(x.float()).to(self.dtype)

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        values = x.float() if smooth is None else x.float() * smooth.float()
        largest = _largest(values)
        # A tensor over a tensor: torch computes a number over a tensor as the number times its reciprocal.
        factor = torch.full_like(largest, 127.0) / largest
        zero = factor.isinf()
        codes = (values * factor.masked_fill(zero, 0.0)[:, None]).round().nan_to_num(0.0).to(torch.int8)
        return Quantized(codes, factor.reciprocal().masked_fill(zero, 0.0))

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        values = _swiglu(x.float())
        scale = _largest(values) / 127.0
        return Quantized((values / _nonzero(scale)).round().nan_to_num(0.0).to(torch.int8), scale)

    # ---- matmuls ---------------------------------------------------------------------------------------------------

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        handle: PartsLinear = linear
        if handle.scheme in (Scheme.W8A8, Scheme.W4A8):
            rows = x if isinstance(x, Quantized) else self.dynamic_quant(x)
            return torch.cat([self._quant_matmul(rows, part) for part in handle.parts], dim=-1)
        if isinstance(x, Quantized):
            kind = "float" if handle.scheme is Scheme.FLOAT else "static W8A8"
            raise BackendError(f"{handle.parts[0].name}: a {kind} linear was given quantized rows")
        if handle.scheme is Scheme.FLOAT:
            return torch.cat([self._float_matmul(x, part.weight) for part in handle.parts], dim=-1)
        static = handle.parts[0].static
        assert static is not None
        codes = self._quantize(x, static.inputs)
        return torch.cat([self._static_matmul(codes, part) for part in handle.parts], dim=-1)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        weight: Tensor = router
        return x.float() @ weight.float().T

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        product = x.transpose(0, 1).float() @ weight.float()
        return product.transpose(0, 1).to(self.dtype)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        outputs = []
        for rows, expert in zip(_split(x, group_list), experts, strict=True):
            outputs.append(self.linear(rows, expert))
        return torch.cat(outputs)

    def _float_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.float(), weight.float()).to(self.dtype)

    def _quant_matmul(self, rows: Quantized, part: LinearPart) -> Tensor:
        codes = unpack_int4(part.weight) if part.scheme is Scheme.W4A8 else part.weight
        # float64 holds every sum of products of two int8 exactly.
        accumulator = rows.codes.double() @ codes.double().T
        assert part.scale is not None
        return (accumulator.float() * part.scale.T * rows.scale[:, None]).to(self.dtype)

    def _quantize(self, x: Tensor, inputs: InputScale) -> Tensor:
        # The device takes the scale's inverse in the dtype of x.
        factor = (1.0 / torch.tensor(inputs.scale).to(self.dtype)).float()
        return (x.float() * factor + inputs.offset).round().clamp(-128, 127).to(torch.int8)

    def _static_matmul(self, codes: Tensor, part: LinearPart) -> Tensor:
        assert part.static is not None
        accumulator = codes.double() @ part.weight.double().T + part.static.quant_bias
        return (accumulator.float() * part.static.deq_scale).to(self.dtype)

    # ---- routing ---------------------------------------------------------------------------------------------------

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid() if gating.scoring == "sigmoid" else logits.softmax(-1)
        choice = scores if bias is None else scores + bias
        if gating.group_count > 1:
            choice = _keep_best_groups(choice, gating)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : gating.k]
        weights = scores.gather(-1, ids)
        if gating.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * gating.scaling, ids.int()

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        order = expert_ids.flatten().sort(stable=True).indices
        rows = x[order // expert_ids.shape[1]]
        row_index = torch.empty_like(order, dtype=torch.int32)
        row_index[order] = torch.arange(len(order), dtype=torch.int32)
        group_list = torch.bincount(expert_ids.flatten(), minlength=num_experts)
        if not quantize:
            return rows, row_index, group_list
        values = rows.float()
        scale = _largest(values) / 127.0
        quotient = (values / _nonzero(scale)).nan_to_num(0.0)
        whole = quotient.trunc()
        # Not floor(|q| + ½): that sum rounds up for the float just below ½.
        codes = whole + ((quotient - whole).abs() >= 0.5) * quotient.sign()
        return Quantized(codes.to(torch.int8), scale), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        tokens, k = weights.shape
        chosen = rows[row_index.long()].view(tokens, k, -1).float()
        factors = weights.to(self.dtype).float()
        out = torch.zeros_like(chosen[:, 0]) if skip is None else skip.float()
        for j in range(k):
            out = out + factors[:, j, None] * chosen[:, j]
        return out.to(self.dtype)

    # ---- attention -------------------------------------------------------------------------------------------------

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rope(x.float(), cos[:, None].float(), sin[:, None].float()).to(self.dtype)

    def kv_rmsnorm_rope_cache(
        self,
        kv: Tensor,
        gamma: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cache: LayerCache,
        eps: float,
        output_kv: bool,
    ) -> tuple[Tensor, Tensor] | None:
        latent, rope = kv.split([gamma.shape[0], cos.shape[-1]], dim=-1)
        latent = self.rms_norm(latent, gamma, eps)
        rope = _rope(rope.float(), cos.float(), sin.float()).to(self.dtype)
        if cache.latent_scale is None:
            write_nz(cache.latent, slots, latent)
        else:
            write_nz(cache.latent, slots, latent_codes(latent, cache.latent_scale))
            latent = cached_latent(latent, cache.latent_scale) if output_kv else latent
        write_nz(cache.rope, slots, rope)
        return (rope, latent) if output_kv else None

    def fused_infer_attention(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        value: Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        query = torch.cat([q_nope, q_rope], dim=-1).float()
        key = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], dim=-1).float()
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(pairwise([0, *q_lens]), pairwise([0, *kv_lens]), strict=True):
            past = (k1 - k0) - (q1 - q0) if causal else None
            out, lse = self._attention(query[q0:q1], key[k0:k1], value[k0:k1].float(), scale, past)
            outputs.append(out.to(self.dtype))
            lses.append(lse)
        return torch.cat(outputs), torch.cat(lses)

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        content = q_latent.float() if cache.latent_scale is None else self._in_codes(q_latent, cache.latent_scale)
        query = torch.cat([content, q_rope.float()], dim=-1)
        outputs = []
        for (q0, q1), length, blocks in zip(
            pairwise([0, *decode.q_lens]), decode.kv_lens, decode.block_table, strict=True
        ):
            used = blocks[: -(-length // cache.block_size)]
            latent = read_nz(cache.latent, used, length).float()
            key = torch.cat([latent, read_nz(cache.rope, used, length).float()], dim=-1)
            out, _ = self._attention(query[q0:q1], key[:, None], latent[:, None], scale, length - (q1 - q0))
            outputs.append((out if cache.latent_scale is None else out * cache.latent_scale).to(self.dtype))
        return torch.cat(outputs)

    def _in_codes(self, q_latent: Tensor, scale: Tensor) -> Tensor:
        """Queries `[T, N, L]` for keys that are int8 codes, as rounded to int8 per token and head: float32."""
        rows = self.dynamic_quant(q_latent.flatten(0, 1), scale)
        return (rows.codes.float() * rows.scale[:, None]).view(q_latent.shape)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int | None
    ) -> tuple[Tensor, Tensor]:
        """query `[Q, N, A]`, key `[S, N or 1, A]`, value `[S, N or 1, V]`, float32 → (`[Q, N, V]`, lse `[Q, N, 1]`).

        past: query i sees keys up to past + i; None: all keys.
        """
        scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * scale  # [N, Q, S]
        if past is not None:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(past + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        blind = lse.isneginf()  # rows that see no key
        probabilities = (scores - lse.masked_fill(blind, 0.0)).exp()
        return (probabilities @ value.transpose(0, 1)).transpose(0, 1), lse.transpose(0, 1)

    def gather_pa_kv_cache(self, cache: LayerCache, segment: PrefixSegment) -> tuple[Tensor, Tensor]:
        blocks = segment.block_table[0]
        latent = read_nz(cache.latent, blocks, segment.length)
        if cache.latent_scale is not None:
            latent = (latent.float() * cache.latent_scale).to(self.dtype)
        return latent, read_nz(cache.rope, blocks, segment.length)

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        weights = torch.stack(list(lses)).softmax(dim=0)  # [parts, T, N, 1]
        return (weights * torch.stack(list(outputs)).float()).sum(0).to(self.dtype)


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _largest(values: Tensor) -> Tensor:
    """max |value| of each row; NaN for a row with a NaN or an infinity, which no scale can carry: its codes are 0 and
    its scale NaN, so that all that follows from it is NaN and not a plausible number."""
    largest = values.abs().amax(-1)
    return largest.masked_fill(largest.isinf(), torch.nan)


def _nonzero(scale: Tensor) -> Tensor:
    """The scale as a divisor `[rows, 1]`: 1 where it is 0, whose rows are all zeros."""
    return scale.masked_fill(scale == 0, 1.0)[:, None]


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even, odd], dim=-1) * cos + torch.cat([-odd, even], dim=-1) * sin


def _keep_best_groups(choice: Tensor, gating: Gating) -> Tensor:
    grouped: Tensor = choice.unflatten(-1, (gating.group_count, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1) if gating.group_select_mode == 1 else grouped.amax(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : gating.k_group]
    dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
    return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)


def _split(x: Activation, group_list: Tensor) -> Iterator[Activation]:
    sizes = group_list.tolist()
    if isinstance(x, Quantized):
        yield from (Quantized(*pair) for pair in zip(x.codes.split(sizes), x.scale.split(sizes), strict=True))
    else:
        yield from x.split(sizes)
