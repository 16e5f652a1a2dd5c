"""Attention weights of a layer, laid out for the NPU's attention operators: fused linears and split ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .....errors import BackendError
from .....formats.schemes import Scheme
from ...handles import Linear, LinearPart, Mla, MlaConfig, MlaParts, Static
from ..weights import AscendWeights, FloatLinear, W8A8Linear, fits_nz
from .limits import check_mla, takes_prolog


@dataclass(frozen=True)
class PrologWeights:
    """Linears of `npu_mla_prolog_v3`: W8A8 q_a, q_b (nope and rope of each head side by side) and kv_a."""

    q_a: W8A8Linear
    q_b: W8A8Linear
    kv_a: W8A8Linear


@dataclass(frozen=True)
class Projections:
    """Linears of a layer without the prolog. q_a: None in models without q_lora. q_nope, q_rope: the two parts of the
    queries.

    One linear each: columns of a fused one are strided, and the operators that follow would copy them first.
    """

    q_a: Linear | None
    kv_a: Linear
    q_nope: Linear
    q_rope: Linear


@dataclass(frozen=True)
class AscendMla(Mla):
    """Attention weights of one layer.

    Two linears decompress keys (`k_b`) and values (`v_b`), so that both are contiguous, as the attention operator
    requires. takes_quantized: True if the projections of the hidden state take int8 rows. caches_codes: True if the
    scales of an int8 cache are folded into norm and weights (`folding.py`).
    """

    projections: PrologWeights | Projections
    q_a_norm: Tensor | None
    k_b: FloatLinear
    v_b: FloatLinear
    takes_quantized: bool
    caches_codes: bool = False


def lay_out_mla(parts: MlaParts, config: MlaConfig, weights: AscendWeights, fused_prolog: bool) -> AscendMla:
    """Put a layer's attention weights on the device. Raises BackendError for sizes that the operators do not take."""
    check_mla(parts.kv_a.name, config)
    widths = [config.qk_nope_head_dim, config.v_head_dim]
    k_b, v_b = parts.kv_b.view(config.heads, sum(widths), config.kv_lora_rank).split(widths, dim=1)
    prolog = prolog_weights(parts, config, weights) if fused_prolog else None
    first = parts.q if parts.q_a is None else parts.q_a
    return AscendMla(
        config=config,
        projections=projections(parts, config, weights) if prolog is None else prolog,
        q_a_norm=None if parts.q_a_norm is None else weights.parameter(parts.q_a_norm, weights.dtype),
        kv_a_norm=weights.parameter(parts.kv_a_norm, weights.dtype),
        k_b=weights.float_linear([k_b.reshape(-1, config.kv_lora_rank)]),
        v_b=weights.float_linear([v_b.reshape(-1, config.kv_lora_rank)]),
        w_uk=weights.parameter(k_b, weights.dtype),
        w_uv=weights.parameter(v_b.transpose(1, 2), weights.dtype),
        o=weights.row_parallel_of(parts.o),
        takes_quantized=all(part is not None and part.scheme is Scheme.W8A8 for part in (first, parts.kv_a)),
    )


def prolog_weights(parts: MlaParts, config: MlaConfig, weights: AscendWeights) -> PrologWeights | None:
    """Weights for `npu_mla_prolog_v3`, or None for a layer of undocumented shape or scheme."""
    if weights.dtype != torch.bfloat16 or parts.q_a is None or parts.q_b is None:
        return None
    linears = (parts.q_a, parts.q_b, parts.kv_a)
    if not takes_prolog(parts.kv_a.weight.shape[1], config) or any(
        part.scheme is not Scheme.W8A8 or not fits_nz(part.weight.t()) for part in linears
    ):
        return None
    return PrologWeights(*(weights.w8a8_linear([part]) for part in linears))


def projections(parts: MlaParts, config: MlaConfig, weights: AscendWeights) -> Projections:
    """The linears before attention. Raises BackendError for a layer without queries."""
    queries = parts.q_b if parts.q is None else parts.q
    if queries is None:
        raise BackendError(f"{parts.kv_a.name}: the layer has no q and no q_b")
    halves = head_rows(queries, config.heads, (config.qk_nope_head_dim, config.qk_rope_head_dim))
    q_nope, q_rope = (weights.linear_of([half]) for half in halves)
    q_a = None if parts.q_a is None else weights.linear_of([parts.q_a])
    return Projections(q_a, weights.linear_of([parts.kv_a]), q_nope, q_rope)


def head_rows(part: LinearPart, num_heads: int, widths: tuple[int, int]) -> tuple[LinearPart, LinearPart]:
    """Split a linear with heads of `widths[0] + widths[1]` outputs in two: the first of each head, and the others."""

    def pick(tensor: Tensor, side: int) -> Tensor:
        heads = tensor.view(num_heads, sum(widths), *tensor.shape[1:])
        return heads.split(list(widths), dim=1)[side].flatten(0, 1)

    def half(side: int) -> LinearPart:
        scale = None if part.scale is None else pick(part.scale, side)
        static = part.static and Static(
            part.static.inputs, pick(part.static.deq_scale, side), pick(part.static.quant_bias, side)
        )
        return LinearPart(part.name, part.scheme, pick(part.weight, side), scale, static=static)

    return half(0), half(1)
