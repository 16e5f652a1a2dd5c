"""All cases by the names that `npuq doctor --selftest` prints."""

from __future__ import annotations

from ....formats.schemes import Scheme
from ...ops import (
    Gating,
)
from .attention import (
    int8_attention,
    int8_cache_write,
    paged_attention,
    ragged_attention,
    rope_and_cache,
)
from .data import (
    EXPERTS,
    HEAD,
    HEADS,
    HIDDEN,
    LATENT,
    ROPE,
    TOKENS,
    Case,
    random_rows,
    random_weight,
    rope_rows,
)
from .feed_forward import (
    divided_linear,
    divided_swiglu,
    experts_inner,
    gating_top_k,
    grouped,
    layer_norm,
    linear,
    norms,
    routing,
    wide_swiglu,
)
from .grouped_attention import grouped_layer, grouped_prefill
from .layers import attention_layer
from .sparse_attention import index_keys, lightning_indexer, sparse_attention

CASES: dict[str, Case] = {
    "rms_norm, add_rms_norm": norms,
    "layer_norm": layer_norm,
    "swiglu": lambda ops: (ops.norms.swiglu(random_rows(ops, TOKENS, HIDDEN)),),
    "dynamic_quant": lambda ops: (ops.norms.dynamic_quant(random_rows(ops, TOKENS, HIDDEN)),),
    "dequant_swiglu_quant": lambda ops: (ops.norms.dequant_swiglu_quant(random_rows(ops, TOKENS, HIDDEN)),),
    "dequant_swiglu_quant, wide rows": wide_swiglu,
    "linear FLOAT": linear(Scheme.FLOAT),
    "linear W8A8": linear(Scheme.W8A8),
    "linear W8A8, static": linear(Scheme.W8A8_STATIC),
    "linear W8A8, divided": divided_linear(Scheme.W8A8),
    "linear W8A8, static, divided": divided_linear(Scheme.W8A8_STATIC),
    "dequant_swiglu_quant, divided": divided_swiglu,
    "batch_matmul": lambda ops: (
        ops.products.batch_matmul(
            random_rows(ops, TOKENS, HEADS, HEAD), ops.weights.parameter(random_rows(ops, HEADS, HEAD, LATENT, seed=2))
        ),
    ),
    "router_logits": lambda ops: (
        ops.products.router_logits(
            random_rows(ops, TOKENS, HIDDEN), ops.weights.router(random_weight(EXPERTS, HIDDEN, seed=30))
        ),
    ),
    "gating sigmoid, groups, bias": gating_top_k(
        Gating(4, "sigmoid", group_count=8, k_group=4, group_select_mode=1, renormalize=True, scaling=2.5), biased=True
    ),
    "gating softmax": gating_top_k(Gating(4, "softmax"), biased=False),
    "grouped_matmul FLOAT": grouped(Scheme.FLOAT),
    "grouped_matmul W8A8": grouped(Scheme.W8A8),
    "grouped_matmul W4A8": grouped(Scheme.W4A8),
    "gate and up of experts, activated": experts_inner(Scheme.W4A8),
    "routing float": routing(quantize=False),
    "routing int8": routing(quantize=True),
    "rope, cache write and read": rope_and_cache,
    "rope of halves": lambda ops: (
        ops.rotary.rotary_mul(random_rows(ops, TOKENS, HEADS, ROPE, seed=9), *rope_rows(ops, TOKENS)),
    ),
    "attention, ragged": ragged_attention(HEAD, HEAD),
    "attention, ragged, heads of 256": ragged_attention(192, 256),
    "attention, paged": paged_attention,
    "int8 cache write and read": int8_cache_write,
    "decode attention, int8 cache": int8_attention(HEADS, fused=False),
    "decode attention, int8 cache, 5 heads": int8_attention(5, fused=False),
    "decode attention, int8 cache, prolog shapes": int8_attention(HEADS, fused=True),
    "index keys": index_keys,
    "lightning indexer": lightning_indexer,
    "attention to selected tokens": sparse_attention(HEADS),
    "attention to selected tokens, 128 heads": sparse_attention(128),
    "grouped-query attention, ragged": grouped_prefill,
    "grouped-query attention FLOAT": grouped_layer(Scheme.FLOAT, HEAD, biases=False),
    "grouped-query attention W8A8": grouped_layer(Scheme.W8A8, HEAD, biases=False),
    "grouped-query attention W8A8, partial rotation, biases": grouped_layer(Scheme.W8A8, HEAD // 2, biases=True),
    "decode attention FLOAT": attention_layer(Scheme.FLOAT, HIDDEN, q_lora=192),
    "decode attention W8A8": attention_layer(Scheme.W8A8, HIDDEN, q_lora=192),
    "decode attention W8A8, static": attention_layer(Scheme.W8A8_STATIC, HIDDEN, q_lora=192),
    "decode attention W8A8, prolog shapes": attention_layer(Scheme.W8A8, 1024, q_lora=1536),
    "decode attention W8A8, indexer W8A8": attention_layer(Scheme.W8A8, 1024, 1536, indexer=Scheme.W8A8),
    "decode attention W8A8, indexer FLOAT": attention_layer(Scheme.W8A8, 1024, 1536, indexer=Scheme.FLOAT),
}

INT8_CACHE_CASES = tuple(name for name in CASES if "int8 cache" in name)
