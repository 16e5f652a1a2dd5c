"""No tensor that is other than its call says reaches a kernel: a ValueError names the operator and the argument."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import npuq
from npuq.errors import BackendError
from npuq.formats.schemes import Scheme
from npuq.native import binding as native
from npuq.quant.stored_rows import BlockScale, StoredRows
from npuq.runtime.attention.pools import Pages, Pool
from npuq.runtime.ops import (
    Decode,
    Gating,
    Keys,
    LayerCache,
    Lengths,
    LinearPart,
    MlaConfig,
    MlaParts,
    MlpWeights,
    MoeWeights,
    Positions,
    Quantized,
    Queries,
    Step,
)
from npuq.runtime.ops.handles import own
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.native.weights import NativeLinear
from npuq.runtime.ranks.division import Division
from npuq.runtime.ranks.group import Alone

from .cases import LEVELS, part

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

T, H, N, NOPE, ROPE, LATENT, V, BLOCK, BLOCKS = 3, 24, 2, 8, 16, 32, 10, 16, 4
Q_LORA = 12


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    return NativeOps(threads=2)


def _x(*shape: int) -> Tensor:
    return torch.ones(shape)


def _float(rows: int, columns: int) -> LinearPart:
    return LinearPart(f"{rows}x{columns}", Scheme.FLOAT, torch.ones(rows, columns))


def _cache(ops: NativeOps, latent: int = LATENT) -> LayerCache:
    return ops.caches.new((Pool("latent", latent), Pool("rope", ROPE)), BLOCKS, BLOCK)


def _decode(**changes: Any) -> Decode:
    table = torch.tensor([[0, 1], [2, 0], [3, 0]], dtype=torch.int32)
    return dataclasses.replace(Decode((1, 2, 3), (17, 5, 16), table), **changes)


def _step(**changes: Any) -> Step:
    slots = torch.tensor([16, 36, 63])
    positions = dataclasses.replace(Positions(slots, _x(T, ROPE), _x(T, ROPE)), **changes)
    return Step(slots, positions, _decode(), None, None)


def _mla_parts(**changes: Any) -> MlaParts:
    parts = MlaParts(
        q=None,
        q_a=_float(Q_LORA, H),
        q_a_norm=_x(Q_LORA),
        q_b=_float(N * (NOPE + ROPE), Q_LORA),
        kv_a=_float(LATENT + ROPE, H),
        kv_a_norm=_x(LATENT),
        kv_b=_x(N * (NOPE + V), LATENT),
        o=_float(H, N * V),
    )
    return dataclasses.replace(parts, **changes)


CONFIG = MlaConfig(N, Q_LORA, LATENT, NOPE, ROPE, V, 1e-6, 0.2)


def _mla(ops: NativeOps, **changes: Any) -> Any:
    return ops.mla.load(_mla_parts(**changes), CONFIG)


def _moe(ops: NativeOps, shared: MlpWeights | None = None, **changes: Any) -> MoeWeights:
    weights = MoeWeights(
        router=ops.weights.router(_x(4, H)),
        correction_bias=_x(4),
        gating=Gating(2, "sigmoid", group_count=2, k_group=1),
        gate_up=ops.weights.experts_of([[_float(6, H), _float(6, H)]] * 4),
        down=ops.weights.experts_of([[_float(H, 6)]] * 4),
        num_experts=4,
        quantized=False,
    )
    return ops.routing.moe_of(dataclasses.replace(weights, shared=shared, **changes))


def _mlp(ops: NativeOps, width: int = H, inner: int = 6, out: int = H) -> MlpWeights:
    return MlpWeights(
        ops.weights.linear_of([_float(inner, width), _float(inner, width)]),
        ops.weights.linear_of([_float(out, 6)]),
        False,
    )


def _ids(*rows: tuple[int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def _attention(ops: NativeOps, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "q_nope": _x(T, N, NOPE),
        "q_rope": _x(T, N, ROPE),
        "k_nope": _x(5, N, NOPE),
        "k_rope": _x(5, ROPE),
        "value": _x(5, N, V),
        "q_lens": (1, 3),
        "kv_lens": (2, 5),
    }
    q_nope, q_rope, k_nope, k_rope, value, *lens = {**arguments, **changes}.values()
    lengths = Lengths(*lens, causal=True)
    return ops.mla.fused_infer_attention(Queries(q_nope, q_rope), Keys(k_nope, k_rope, value), lengths, 0.2)


def _paged(ops: NativeOps, latent: int = LATENT, rope: int = ROPE, **changes: Any) -> Any:
    return ops.mla.fused_infer_attention_paged(_x(T, N, latent), _x(T, N, rope), _cache(ops), _decode(**changes), 0.2)


def _write(ops: NativeOps, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "kv": _x(T, LATENT + ROPE),
        "gamma": _x(LATENT),
        "cos": _x(T, ROPE),
        "sin": _x(T, ROPE),
        "slots": torch.tensor([0, -1, 63]),
    }
    kv, gamma, cos, sin, slots = {**arguments, **changes}.values()
    return ops.mla.kv_rmsnorm_rope_cache(kv, gamma, 1e-6, Positions(slots, cos, sin), _cache(ops), output_kv=True)


def _mla_decode(ops: NativeOps, hidden: Tensor | None = None, cache: LayerCache | None = None, **changes: Any) -> Any:
    x = _x(T, H) if hidden is None else hidden
    return ops.mla.decode(x, _mla(ops), _cache(ops) if cache is None else cache, _step(**changes))


def _index_keys(ops: NativeOps, layout: str = "nd") -> Pages:
    return ops.caches.new([Pool("index_key", ROPE, layout=layout)], BLOCKS, BLOCK)["index_key"]


def _index(ops: NativeOps, keys: Pages | None = None, decode: Decode | None = None, **changes: Any) -> Any:
    arguments = {"query": _x(T, 4, ROPE), "weights": _x(T, 4), **changes}
    keys = _index_keys(ops) if keys is None else keys
    return ops.sparse.lightning_indexer(**arguments, keys=keys, decode=decode or _decode(), count=3)


SELECTED = torch.tensor([[[3, 16, -1]], [[0, 4, -1]], [[15, 2, 7]]], dtype=torch.int32)


def _selected(ops: NativeOps, selected: Tensor = SELECTED, cache: LayerCache | None = None) -> Any:
    cache = _cache(ops) if cache is None else cache
    return ops.sparse.sparse_flash_attention(_x(T, N, LATENT), _x(T, N, ROPE), cache, _decode(), selected, 0.2)


def _int8_cache(ops: NativeOps) -> LayerCache:
    pools = Pool("latent", LATENT, int8=True), Pool("rope", ROPE)
    return ops.caches.new(pools, BLOCKS, BLOCK, {"latent": _x(LATENT)})


def _mla_prolog(ops: NativeOps, **changes: Any) -> Any:
    return ops.mla.prolog(_x(T, H), _mla(ops), _cache(ops), _step(**changes))


def _experts(
    ops: NativeOps,
    hidden: Tensor | None = None,
    ids: Tensor | None = None,
    shared: Tensor | None = None,
    **changes: Any,
) -> Any:
    x = _x(T, H) if hidden is None else hidden
    chosen = _ids((0, 1), (3, 2), (1, 3)) if ids is None else ids
    return ops.routing.moe_experts(x, _x(*chosen.shape), chosen, _moe(ops, **changes), shared)


def _own_rows(ops: NativeOps, hidden: Tensor | None = None, ids: Tensor | None = None, **changes: Any) -> Any:
    x = _x(T, H) if hidden is None else hidden
    chosen = _ids((0, 1), (3, 2), (1, 3)) if ids is None else ids
    return ops.routing.own_rows(x, chosen, _moe(ops, **changes))


def _route(ops: NativeOps, ids: Tensor, tokens: int = T) -> Any:
    return ops.routing.moe_init_routing(_x(tokens, H), ids, 4, quantize=True)


def _finalize(ops: NativeOps, index: Tensor, rows: int = 6, **changes: Any) -> Any:
    arguments = {"weights": _x(T, 2), "skip": _x(T, H), **changes}
    return ops.routing.moe_finalize_routing(
        _x(rows, H), arguments["weights"], index, _ids((0, 1), (3, 2), (1, 3)), arguments["skip"]
    )


def _sums(ops: NativeOps, codes: Tensor | None = None, scheme: Scheme = Scheme.W8A8) -> Tensor:
    codes = torch.ones(T, 8, dtype=torch.int8) if codes is None else codes
    stored = part(np.random.default_rng(0), scheme, 4, 8)
    handle = ops.weights.w4a8_experts([[stored]]) if scheme is Scheme.W4A8 else ops.weights.w8a8_linear([stored])
    return ops.products.integer_sums(codes, own(handle, NativeLinear))


def _scaled(ops: NativeOps, **changes: Any) -> Tensor:
    arguments = {"sums": torch.ones(T, 4, dtype=torch.int32), "scale": _x(T), **changes}
    handle = ops.weights.w8a8_linear([part(np.random.default_rng(0), Scheme.W8A8, 4, 8)])
    return ops.products.scale_sums(arguments["sums"], arguments["scale"], handle)


def _divided_mla(ops: NativeOps, values: int = V) -> Any:
    """The attention of one rank of two, each of them with N heads."""
    o = replace(_float(H, 2 * N * V), input_division=Division(Two(), (N * values, N * V)))
    return ops.mla.load(_mla_parts(o=o), CONFIG)


class Two(Alone):
    """The first of two ranks; nothing is exchanged."""

    size = 2


INDEX = torch.arange(6, dtype=torch.int32)
BF16 = torch.bfloat16

# What must run, so that what follows differs from it in one thing.
GOOD: dict[str, Callable[[NativeOps], Any]] = {
    "attention": _attention,
    "attention_paged": _paged,
    "kv_cache_write": _write,
    "mla_decode": _mla_decode,
    "indexer": _index,
    "selected": _selected,
    "mla_prolog": _mla_prolog,
    "moe_experts": _experts,
    "expert_rows": _own_rows,
    "moe_layer": lambda ops: ops.routing.moe(_x(T, H), _moe(ops, _mlp(ops))),
    "moe_gate": lambda ops: ops.routing.moe_gate(_x(T, H), _moe(ops)),
    "mlp": lambda ops: ops.routing.mlp(_x(T, H), _mlp(ops)),
    "init_routing": lambda ops: _route(ops, _ids((0, 3), (3, 2), (1, 3))),
    "finalize_routing": lambda ops: _finalize(ops, INDEX),
    "row_maximum": lambda ops: ops.norms.row_maximum(_x(T, H)),
    "dynamic_quant_by": lambda ops: ops.norms.dynamic_quant_by(_x(T, H), _x(T)),
    "swiglu_quant_by": lambda ops: ops.norms.swiglu_quant_by(ops.norms.swiglu_float32(_x(T, H)), _x(T)),
    "integer_sums": _sums,
    "scale_sums": _scaled,
    "divided mla": _divided_mla,
}

REFUSED: dict[str, tuple[Callable[[NativeOps], Any], str]] = {
    "norm gain": (lambda ops: ops.norms.rms_norm(_x(T, H), _x(H - 1), 1e-6), r"rms_norm: gamma is float32 \[23\]"),
    "norm dtype": (lambda ops: ops.norms.rms_norm(_x(T, H).to(BF16), _x(H), 1e-6), r"rms_norm: x is bfloat16"),
    "sum": (lambda ops: ops.norms.add_rms_norm(_x(T, H), _x(T, H + 1), _x(H), 1e-6), r"add_rms_norm: residual"),
    "sum of fewer": (
        lambda ops: ops.norms.add_rms_norm(_x(T, H), _x(T - 1, H), _x(H), 1e-6),
        r"add_rms_norm: residual",
    ),
    "odd halves": (lambda ops: ops.norms.swiglu(_x(T, 7)), r"swiglu: x is float32 \[3, 7\]"),
    "odd halves, int8": (lambda ops: ops.norms.dequant_swiglu_quant(_x(T, 7)), r"swiglu_quant: x"),
    "double": (lambda ops: ops.norms.dynamic_quant(_x(T, H).double()), r"dynamic_quant: x is float64"),
    "no memory": (lambda ops: ops.norms.dynamic_quant(torch.ones(T, H, device="meta")), r"dynamic_quant: x .* on meta"),
    "linear width": (
        lambda ops: ops.products.linear(_x(T, H), ops.weights.linear_of([_float(4, H + 1)])),
        r"linear: x of a float weight is float32 \[3, 24\]",
    ),
    "linear dtype": (
        lambda ops: ops.products.linear(_x(T, H).half(), ops.weights.linear_of([_float(4, H)])),
        r"linear: x of a float weight is float16",
    ),
    "router width": (
        lambda ops: ops.products.router_logits(_x(T, H), ops.weights.router(_x(4, H - 1))),
        r"linear: x of router",
    ),
    "token scales": (
        lambda ops: ops.products.linear(
            Quantized(torch.ones(T, 8, dtype=torch.int8), _x(T - 1)),
            ops.weights.linear_of([part(np.random.default_rng(0), Scheme.W8A8, 4, 8)]),
        ),
        r"matmul: x_scale of 4x8 is float32 \[2\]",
    ),
    "groups": (
        lambda ops: ops.products.grouped_matmul(
            _x(T, H), ops.weights.experts_of([[_float(4, H)]] * 4), torch.tensor([1, 2, 0])
        ),
        r"matmul: group_list",
    ),
    "rows of groups": (
        lambda ops: ops.products.grouped_matmul(
            _x(T, H), ops.weights.experts_of([[_float(4, H)]] * 2), torch.tensor([2, 2])
        ),
        r"matmul: .* an index or a length",
    ),
    "negative rows": (
        lambda ops: ops.products.grouped_matmul(
            _x(T, H), ops.weights.experts_of([[_float(4, H)]] * 2), torch.tensor([4, -1])
        ),
        r"matmul: .* an index or a length",
    ),
    "heads": (lambda ops: ops.products.batch_matmul(_x(T, N + 1, 8), _x(N, 8, 4)), r"batch_matmul: weight"),
    "head width": (lambda ops: ops.products.batch_matmul(_x(T, N, 9), _x(N, 8, 4)), r"batch_matmul: weight"),
    "integer heads": (lambda ops: ops.products.batch_matmul(_x(T, N, 8), _x(N, 8, 4).char()), r"batch_matmul: weight"),
    "gating, k": (
        lambda ops: ops.routing.moe_gating_top_k(_x(T, 4), None, Gating(5, "sigmoid")),
        r"gating_top_k: .* sizes",
    ),
    "gating, groups": (
        lambda ops: ops.routing.moe_gating_top_k(_x(T, 4), None, Gating(1, "sigmoid", group_count=3)),
        r"gating_top_k: .* sizes",
    ),
    "gating, no groups": (
        lambda ops: ops.routing.moe_gating_top_k(_x(T, 4), None, Gating(1, "sigmoid", group_count=0)),
        r"gating_top_k: .* sizes",
    ),
    "gating, bias": (
        lambda ops: ops.routing.moe_gating_top_k(_x(T, 4), _x(3), Gating(2, "sigmoid")),
        r"gating_top_k: bias",
    ),
    "gating, bias dtype": (
        lambda ops: ops.routing.moe_gating_top_k(_x(T, 4), _x(4).to(BF16), Gating(2, "sigmoid")),
        r"gating_top_k: bias is bfloat16",
    ),
    "expert too high": (lambda ops: _route(ops, _ids((0, 1), (4, 2), (1, 3))), r"init_routing: .* an index"),
    "expert below 0": (lambda ops: _route(ops, _ids((0, 1), (-1, 2), (1, 3))), r"init_routing: .* an index"),
    "ids of more tokens": (lambda ops: _route(ops, _ids((0, 1)), tokens=2), r"init_routing: x"),
    "ids in int64": (lambda ops: _route(ops, _ids((0, 1)).long(), tokens=1), r"init_routing: expert_ids is int64"),
    "places": (lambda ops: _finalize(ops, INDEX + 1), r"finalize_routing: .* an index"),
    "fewer rows": (lambda ops: _finalize(ops, INDEX, rows=5), r"finalize_routing: rows"),
    "fewer places": (lambda ops: _finalize(ops, INDEX[:5]), r"finalize_routing: row_index"),
    "skip": (lambda ops: _finalize(ops, INDEX, skip=_x(T, H - 1)), r"finalize_routing: skip"),
    "weights in half": (lambda ops: _finalize(ops, INDEX, weights=_x(T, 2).half()), r"finalize_routing: weights"),
    "angles": (
        lambda ops: ops.rotary.interleave_rope(_x(T, N, ROPE), _x(T, ROPE), _x(T, 2)),
        r"interleave_rope: sin",
    ),
    "angles of fewer": (
        lambda ops: ops.rotary.interleave_rope(_x(T, N, ROPE), _x(2, ROPE), _x(T, ROPE)),
        r"interleave_rope: cos",
    ),
    "odd rope": (
        lambda ops: ops.rotary.interleave_rope(_x(T, N, 5), _x(T, 5), _x(T, 5)),
        r"interleave_rope: .* sizes",
    ),
    "write, kv": (lambda ops: _write(ops, kv=_x(T, LATENT)), r"kv_cache_write: kv"),
    "write, gain": (lambda ops: _write(ops, gamma=_x(LATENT + 16)), r"kv_cache_write: gamma"),
    "write, wide rope": (lambda ops: _write(ops, cos=_x(T, 2 * ROPE), sin=_x(T, 2 * ROPE)), r"kv_cache_write: cos"),
    "write, narrow sin": (lambda ops: _write(ops, sin=_x(T, 2)), r"kv_cache_write: sin"),
    "write, slot": (lambda ops: _write(ops, slots=torch.tensor([0, 64, 1])), r"kv_cache_write: .* an index"),
    "write, slots": (lambda ops: _write(ops, slots=torch.tensor([0, 1])), r"kv_cache_write: slots"),
    "write, int32 slots": (lambda ops: _write(ops, slots=torch.zeros(T).int()), r"kv_cache_write: slots is int32"),
    "attention, rope": (lambda ops: _attention(ops, k_rope=_x(5, ROPE - 1)), r"attention: k_rope"),
    "attention, keys": (lambda ops: _attention(ops, value=_x(4, N, V)), r"attention: value"),
    "attention, heads": (lambda ops: _attention(ops, q_rope=_x(T, N + 1, ROPE)), r"attention: q_rope"),
    "attention, dtype": (lambda ops: _attention(ops, k_nope=_x(5, N, NOPE).to(BF16)), r"attention: k_nope"),
    "attention, queries": (lambda ops: _attention(ops, q_lens=(1, 4)), r"attention: q_lens"),
    "attention, keys of": (lambda ops: _attention(ops, kv_lens=(2, 6)), r"attention: kv_lens"),
    "attention, sequences": (lambda ops: _attention(ops, kv_lens=(5,)), r"attention: kv_lens"),
    "attention, order": (lambda ops: _attention(ops, kv_lens=(6, 5)), r"attention: .* an index or a length"),
    "paged, latent": (lambda ops: _paged(ops, latent=LATENT + 16), r"attention_paged: q_latent"),
    "paged, rope": (lambda ops: _paged(ops, rope=ROPE * 2), r"attention_paged: q_rope"),
    "paged, queries": (lambda ops: _paged(ops, q_lens=(1, 2, 4)), r"attention_paged: q_lens"),
    "paged, order": (lambda ops: _paged(ops, q_lens=(2, 1, 3)), r"attention_paged: .* an index or a length"),
    "paged, keys": (lambda ops: _paged(ops, kv_lens=(33, 5, 16)), r"attention_paged: .* an index or a length"),
    "paged, lengths": (lambda ops: _paged(ops, kv_lens=(17, 5)), r"attention_paged: kv_lens"),
    "paged, block": (
        lambda ops: _paged(ops, block_table=torch.tensor([[0, 4], [2, 0], [3, 0]], dtype=torch.int32)),
        r"attention_paged: .* an index",
    ),
    "paged, table": (
        lambda ops: _paged(ops, block_table=torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)),
        r"attention_paged: block_table",
    ),
    "paged, table dtype": (
        lambda ops: _paged(ops, block_table=torch.zeros(T, 2).long()),
        r"attention_paged: block_table",
    ),
    "decode, hidden": (lambda ops: _mla_decode(ops, _x(T, H + 1)), r"mla_decode: x"),
    "decode, rope": (
        lambda ops: _mla_decode(ops, cos=_x(T, ROPE // 2)),
        r"mla_decode: (cos has 8 channels, the cache 16|sin)",
    ),
    "decode, rows of rope": (lambda ops: _mla_decode(ops, sin=_x(T - 1, ROPE)), r"mla_decode: sin"),
    "decode, slot": (lambda ops: _mla_decode(ops, slots=torch.tensor([16, 36, 64])), r"mla_decode: .* an index"),
    "decode, other cache": (
        lambda ops: _mla_decode(ops, cache=_cache(ops, LATENT + 16)),
        r"mla_decode: .* sizes",
    ),
    "decode, cache dtype": (
        lambda ops: _mla_decode(ops, cache=_cache(NativeOps(BF16))),
        r"kv cache: rope is torch.bfloat16",
    ),
    "indexer, query": (lambda ops: _index(ops, query=_x(T, 4, 8)), r"lightning_indexer: query"),
    "indexer, weights": (lambda ops: _index(ops, weights=_x(T, 5)), r"lightning_indexer: weights"),
    "indexer, dtype": (lambda ops: _index(ops, weights=_x(T, 4).to(BF16)), r"lightning_indexer: weights is bfloat16"),
    "indexer, nz keys": (lambda ops: _index(ops, keys=_index_keys(ops, "nz")), r"lightning_indexer: .* sizes"),
    "indexer, keys": (
        lambda ops: _index(ops, decode=_decode(kv_lens=(33, 5, 16))),
        r"lightning_indexer: .* an index or a length",
    ),
    "indexer, block": (
        lambda ops: _index(ops, decode=_decode(block_table=torch.tensor([[0, 4], [2, 0], [3, 0]]).int())),
        r"lightning_indexer: .* an index or a length",
    ),
    "selected, rows": (lambda ops: _selected(ops, SELECTED[:2]), r"attention_selected: selected"),
    "selected, int64": (lambda ops: _selected(ops, SELECTED.long()), r"attention_selected: selected is int64"),
    "selected, position": (
        lambda ops: _selected(ops, torch.tensor([[[3]], [[5]], [[0]]]).int()),
        r"attention_selected: .* an index or a length",
    ),
    "selected, codes": (
        lambda ops: _selected(ops, SELECTED, _int8_cache(ops)),
        r"attention_selected: .* sizes",
    ),
    "top_k, seen": (lambda ops: ops.sparse.top_k(_x(2, 4), [4, 5], 2), r"top_k: .* an index or a length"),
    "top_k, rows": (lambda ops: ops.sparse.top_k(_x(2, 4), [4], 2), r"top_k: 1 numbers of columns"),
    "prolog, rope": (lambda ops: _mla_prolog(ops, sin=_x(T, ROPE + 2)), r"mla_prolog: sin"),
    "experts, hidden": (lambda ops: _experts(ops, _x(T, H + 1)), r"moe_experts: x"),
    "experts, expert": (lambda ops: _experts(ops, ids=_ids((0, 1), (3, 2), (1, 4))), r"moe_experts: .* an index"),
    "experts, shared": (lambda ops: _experts(ops, shared=_x(T, H - 1)), r"moe_experts: shared"),
    "experts, halves": (
        lambda ops: _experts(ops, down=ops.weights.experts_of([[_float(H, 7)]] * 4)),
        r"moe_experts: .* sizes",
    ),
    "experts, fewer": (
        lambda ops: _experts(ops, down=ops.weights.experts_of([[_float(H, 6)]] * 3)),
        r"moe_experts: .* sizes",
    ),
    "rows, hidden": (lambda ops: _own_rows(ops, _x(T, H + 1)), r"expert_rows: x"),
    "rows, expert": (lambda ops: _own_rows(ops, ids=_ids((0, 1), (3, 2), (1, 4))), r"expert_rows: .* an index"),
    "rows, experts": (lambda ops: _own_rows(ops, num_experts=3), r"expert_rows: .* sizes"),
    "layer, hidden": (lambda ops: ops.routing.moe(_x(T, H + 1), _moe(ops)), r"moe_layer: x"),
    "layer, router": (
        lambda ops: ops.routing.moe(_x(T, H), _moe(ops, router=ops.weights.router(_x(5, H)), correction_bias=None)),
        r"moe_layer: .* sizes",
    ),
    "layer, bias": (lambda ops: ops.routing.moe(_x(T, H), _moe(ops, correction_bias=_x(5))), r"moe_layer: bias"),
    "layer, router width": (
        lambda ops: ops.routing.moe(_x(T, H), _moe(ops, router=ops.weights.router(_x(4, H + 2)))),
        r"moe_layer: .* sizes",
    ),
    "layer, k": (
        lambda ops: ops.routing.moe(_x(T, H), _moe(ops, gating=Gating(5, "softmax"))),
        r"moe_layer: .* sizes",
    ),
    "layer, shared": (lambda ops: ops.routing.moe(_x(T, H), _moe(ops, _mlp(ops, out=H - 1))), r"moe_layer: .* sizes"),
    "layer, shared inputs": (
        lambda ops: ops.routing.moe(_x(T, H), _moe(ops, _mlp(ops, width=H + 1))),
        r"moe_layer: .* sizes",
    ),
    "gate, hidden": (lambda ops: ops.routing.moe_gate(_x(T, H - 1), _moe(ops)), r"moe_gate: x"),
    "mlp, hidden": (lambda ops: ops.routing.mlp(_x(T, H - 1), _mlp(ops)), r"mlp: x"),
    "mlp, halves": (lambda ops: ops.routing.mlp(_x(T, H), _mlp(ops, inner=7)), r"mlp: .* sizes"),
    "mla, norm": (lambda ops: _mla(ops, kv_a_norm=_x(LATENT - 1)), r"mla: kv_a_norm"),
    "mla, q norm": (lambda ops: _mla(ops, q_a_norm=_x(Q_LORA + 1)), r"mla: q_a_norm"),
    "mla, no q norm": (lambda ops: _mla(ops, q_a_norm=None), r"mla: q_b and q_a_norm come together"),
    "mla, kv_a": (lambda ops: _mla(ops, kv_a=_float(LATENT + ROPE + 16, H)), r"mla: 76 outputs of q_a and kv_a"),
    "mla, q_b": (lambda ops: _mla(ops, q_b=_float(N * (NOPE + ROPE) - 1, Q_LORA)), r"mla: 47 outputs of q_b"),
    "maximum, double": (lambda ops: ops.norms.row_maximum(_x(T, H).double()), r"rows of torch.float64"),
    "maximum, float16": (lambda ops: ops.norms.dynamic_quant_by(_x(T, H).half(), _x(T)), r"rows of torch.float16"),
    "maxima of fewer": (lambda ops: ops.norms.dynamic_quant_by(_x(T, H), _x(T - 1)), r"quant_parts: largest"),
    "maxima, dtype": (
        lambda ops: ops.norms.swiglu_quant_by(_x(T, H), _x(T).to(BF16)),
        r"quant_parts: largest is bfloat16",
    ),
    "sums, width": (lambda ops: _sums(ops, torch.ones(T, 7, dtype=torch.int8)), r"integer_sums: x of 4x8"),
    "sums, floats": (lambda ops: _sums(ops, _x(T, 8)), r"integer_sums: x of 4x8 is float32"),
    "sums, int4": (lambda ops: _sums(ops, scheme=Scheme.W4A8), r"integer_sums: .* sizes"),
    "scaled, sums": (lambda ops: _scaled(ops, sums=_x(T, 4)), r"scale_sums: sums of 4x8 is float32"),
    "scaled, width": (lambda ops: _scaled(ops, sums=torch.ones(T, 5).int()), r"scale_sums: sums of 4x8"),
    "scaled, scale": (lambda ops: _scaled(ops, scale=_x(T + 1)), r"scale_sums: scale of 4x8"),
    "mla, divided o": (lambda ops: _divided_mla(ops, V - 1), r"mla: 18 inputs of o"),
    "mla, o": (lambda ops: _mla(ops, o=_float(H, N * V + 1)), r"mla: 21 inputs of o"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_fits_runs(ops: NativeOps, name: str) -> None:
    GOOD[name](ops)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(ops: NativeOps, case: str) -> None:
    run, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(ops)


def test_caches_that_are_none(ops: NativeOps) -> None:
    good = _cache(ops)
    latent, rope = good["latent"], good["rope"]

    def plain(**pages: Pages) -> LayerCache:
        return LayerCache({**good.pages, **pages}, good.block_size)

    for cache, message in (
        (LayerCache(good.pages, 32), "kv cache: latent"),
        (plain(rope=replace(rope, tensor=rope.tensor[:3])), "kv cache: rope"),
        (plain(latent=replace(latent, tensor=latent.tensor.transpose(1, 2))), "kv cache: latent"),
        (plain(rope=replace(rope, tensor=rope.tensor.half())), "kv cache: rope"),
        (plain(rope=replace(rope, pool=replace(rope.pool, dtype=torch.float16))), "kv cache: rope"),
        (plain(latent=replace(latent, pool=replace(latent.pool, layout="nd"))), "kv cache: latent"),
        (plain(latent=replace(latent, scale=_x(LATENT))), "kv cache: latent"),
    ):
        with pytest.raises(ValueError, match=message):
            _mla_decode(ops, cache=cache)


def test_weights_that_are_none(ops: NativeOps) -> None:
    generator = np.random.default_rng(0)
    eight = part(generator, Scheme.W8A8, 4, 8)
    for changes, message in (
        ({"scale": None}, "scale None"),
        ({"scale": _x(3, 1)}, "scale"),
        ({"scale": _x(4, 1).double()}, "float64"),
        ({"weight": torch.ones(4, 8)}, "W8A8_DYNAMIC weight of dtype torch.float32"),
        ({"weight": torch.ones(4, 8, 1, dtype=torch.int8)}, "no matrix"),
    ):
        with pytest.raises(BackendError, match=message):
            ops.weights.linear_of([dataclasses.replace(eight, **changes)])
    with pytest.raises(ValueError, match=r"linear: 4x8 is int8 .* on meta"):
        ops.weights.linear_of([dataclasses.replace(eight, weight=torch.ones(4, 8, dtype=torch.int8, device="meta"))])


def test_rows_may_lie_apart_and_be_shared(ops: NativeOps) -> None:
    """Views that the kernels take as they are; torch's own sum of them is the judge."""
    wide = torch.randn(T, 2 * H)
    norm = wide[:, H:] * torch.rsqrt(wide[:, H:].square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(ops.norms.rms_norm(wide[:, H:], _x(H), 1e-6), norm)
    shared = torch.randn(1, H).expand(T, H)
    same = ops.norms.dynamic_quant(shared)
    assert torch.equal(same.codes, ops.norms.dynamic_quant(shared.contiguous()).codes)


def test_pieces_of_a_weight_that_are_not_there() -> None:
    rows = torch.ones(4, 16)
    out = native.NativeRows(np.empty((4, 16), np.int8), np.empty((8, 1), np.float32), None, *np.empty((2, 8)))
    quantizer = native.Quantizer(native.source_rows(StoredRows(rows)), 8, False, out)
    quantizer.run(4, 4, 0)
    for start, count, code_row in ((0, 5, 0), (5, 4, 0), (-1, 2, 0), (0, -1, 0), (0, 4, 1), (0, 1, 4), (0, 1, -1)):
        with pytest.raises(ValueError, match="quantize_rows: rows"):
            quantizer.run(start, count, code_row)


def _quantizer(rows: Tensor, blocks: BlockScale | None, bits: int, **changes: Any) -> None:
    out = native.NativeRows(
        np.empty((len(rows) // (2 if bits == 4 else 1), rows.shape[1]), np.int8),
        np.empty((len(rows), 1), np.float32),
        np.empty((len(rows), 1), np.float32) if bits == 4 else None,
        *np.empty((2, len(rows))),
    )
    out = dataclasses.replace(out, **{name: None if each is None else each.numpy() for name, each in changes.items()})
    native.Quantizer(native.source_rows(StoredRows(rows, blocks)), bits, True, out).run(0, len(rows), 0)


FP8 = torch.ones(4, 20).to(torch.float8_e4m3fn)
INT4 = torch.ones(4, 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("rows", "blocks", "bits", "changes"),
    [
        (_x(4, 16), None, 8, {"codes": torch.empty(4, 15, dtype=torch.int8)}),
        (_x(4, 16), None, 8, {"scale": torch.empty(4)}),
        (_x(4, 16), None, 8, {"squared_norm": torch.empty(4)}),
        (_x(4, 16), None, 4, {"bias": None}),
        (_x(4, 16), None, 4, {"bias": torch.empty(4, 3)}),
        (_x(4, 17), None, 4, {"bias": torch.empty(4, 17)}),
        (_x(3, 16), None, 4, {}),
        (_x(4, 16), None, 5, {}),
        (_x(4, 0), None, 8, {}),
        (_x(4, 16).double(), None, 8, {}),
        (_x(4, 16).char(), None, 8, {}),
        (FP8, None, 8, {}),
        (_x(4, 20), BlockScale(_x(2, 2), 0, 2, 10), 8, {}),
        (FP8, BlockScale(_x(2, 2), 1, 2, 10), 8, {}),
        (FP8, BlockScale(_x(2, 2), 0, 2, 9), 8, {}),
        (FP8, BlockScale(_x(2, 2).half(), 0, 2, 10), 8, {}),
        (FP8, BlockScale(_x(2, 2), -1, 2, 10), 8, {}),
        (FP8, BlockScale(_x(2, 2), 0, 2, 0), 8, {}),
        (FP8, BlockScale(_x(2, 2), 0, 0, 10), 8, {}),
        (FP8, BlockScale(_x(1, 2), 0, (1 << 64) + 1, 10), 8, {}),
        (FP8, BlockScale(_x(1, 2), 0, 1 << 31, 10), 8, {}),
        (FP8, BlockScale(_x(4, 1), 0, 1, (1 << 64) + 20), 8, {}),
        (FP8, BlockScale(_x(2, 2), 1 << 64, 2, 10), 8, {}),
        (FP8, BlockScale(_x(2, 3), 0, 2, 10), 8, {}),
        (FP8, BlockScale(_x(20), 0, 1, 20), 8, {}),
        (INT4, None, 8, {}),
        (INT4, BlockScale(_x(4, 2), 0, 1, 10), 8, {}),  # of 40 inputs
        (INT4, BlockScale(_x(4, 8), 0, 1, 5), 8, {"codes": torch.empty(4, 40, dtype=torch.int8)}),
    ],
)
def test_quantization_of_what_does_not_fit(
    rows: Tensor, blocks: BlockScale | None, bits: int, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"quantize_rows|Source: first_row"):
        _quantizer(rows, blocks, bits, **changes)


def test_quantization_of_rows_that_lie_apart() -> None:
    out = native.NativeRows(np.empty((4, 16), np.int8), np.empty((4, 1), np.float32), None, *np.empty((2, 4)))
    rows = np.zeros((4, 128), np.uint8)[:, :64]
    with pytest.raises(ValueError, match="quantize_rows: rows is uint8"):
        native.Quantizer(native.SourceRows(rows, "F32"), 8, True, out)


def test_quantization_of_what_fits() -> None:
    _quantizer(FP8, BlockScale(_x(2, 2), 0, 2, 10), 4)
    _quantizer(INT4, BlockScale(_x(4, 4), 0, 1, 10), 4, codes=torch.empty(2, 40, dtype=torch.int8))


def test_addresses_come_from_one_place() -> None:
    """Whoever needs one has its tensor looked at."""
    package = Path(npuq.__file__).parent
    users = set()
    for room in (path.parent for path in package.glob("*/__init__.py")):
        for path in room.rglob("*.py"):
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            if "data_ptr" in names:
                users.add(path.relative_to(package).as_posix())
    assert users == {"native/pointers.py"}
