"""The shapes of `random_artifact.py` in llama.cpp's words: settings and tensors of a GGUF. Needs nothing installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tensors = list[tuple[str, tuple[int, ...], str]]
"""Names without `.weight`, shapes and types."""
VOCABULARY, HIDDEN = 32768, 2048
SIGMOID = 2  # gguf.ExpertGatingFuncType


@dataclass(frozen=True)
class Shape:
    """A model. settings: `GGUFWriter.add_<name>(value)`. layer: the tensors of a layer.

    head: type of the output matrix.
    """

    architecture: str
    layers: int
    settings: dict[str, Any]
    layer: Callable[[int], Tensors]
    head: str = "Q8_0"

    def tensors(self) -> Tensors:
        found: Tensors = [
            ("token_embd", (VOCABULARY, HIDDEN), "Q8_0"),
            ("output", (VOCABULARY, HIDDEN), self.head),
            ("output_norm", (HIDDEN,), "F32"),
        ]
        for number in range(self.layers):
            found += [(f"blk.{number}.{name}", shape, kind) for name, shape, kind in self.layer(number)]
        return found


def _experts(count: int, width: int) -> Tensors:
    return [
        ("ffn_gate_inp", (count, HIDDEN), "F32"),
        ("ffn_gate_exps", (count, width, HIDDEN), "Q4_0"),
        ("ffn_up_exps", (count, width, HIDDEN), "Q4_0"),
        ("ffn_down_exps", (count, HIDDEN, width), "Q4_0"),
    ]


def _v3_layer(number: int) -> Tensors:
    heads, q_lora, kv_lora, nope, rope, value = 16, 1536, 512, 128, 64, 128
    attention: Tensors = [
        ("attn_norm", (HIDDEN,), "F32"),
        ("attn_q_a_norm", (q_lora,), "F32"),
        ("attn_kv_a_norm", (kv_lora,), "F32"),
        ("ffn_norm", (HIDDEN,), "F32"),
        ("attn_q_a", (q_lora, HIDDEN), "Q8_0"),
        ("attn_q_b", (heads * (nope + rope), q_lora), "Q8_0"),
        ("attn_kv_a_mqa", (kv_lora + rope, HIDDEN), "Q8_0"),
        ("attn_k_b", (heads, kv_lora, nope), "Q8_0"),
        ("attn_v_b", (heads, value, kv_lora), "Q8_0"),
        ("attn_output", (HIDDEN, heads * value), "Q8_0"),
    ]
    if number == 0:
        dense = 8192
        return [
            *attention,
            ("ffn_gate", (dense, HIDDEN), "Q8_0"),
            ("ffn_up", (dense, HIDDEN), "Q8_0"),
            ("ffn_down", (HIDDEN, dense), "Q8_0"),
        ]
    shared = 2 * 1408
    return [
        *attention,
        *_experts(64, 1408),
        ("exp_probs_b.bias", (64,), "F32"),
        ("ffn_gate_shexp", (shared, HIDDEN), "Q8_0"),
        ("ffn_up_shexp", (shared, HIDDEN), "Q8_0"),
        ("ffn_down_shexp", (HIDDEN, shared), "Q8_0"),
    ]


def _qwen3_layer(number: int) -> Tensors:
    heads, kv_heads, width = 32, 4, 128
    return [
        ("attn_norm", (HIDDEN,), "F32"),
        ("attn_q_norm", (width,), "F32"),
        ("attn_k_norm", (width,), "F32"),
        ("ffn_norm", (HIDDEN,), "F32"),
        ("attn_q", (heads * width, HIDDEN), "Q8_0"),
        ("attn_k", (kv_heads * width, HIDDEN), "Q8_0"),
        ("attn_v", (kv_heads * width, HIDDEN), "Q8_0"),
        ("attn_output", (HIDDEN, heads * width), "Q8_0"),
        *_experts(128, 768),
    ]


_COMMON: dict[str, Any] = {
    "context_length": 65536,
    "embedding_length": HIDDEN,
    "rope_freq_base": 10000.0,
    "layer_norm_rms_eps": 1e-6,
    "vocab_size": VOCABULARY,
}

SHAPES = {
    "v3": Shape(
        "deepseek2",
        8,
        {
            **_COMMON,
            "block_count": 8,
            "feed_forward_length": 8192,
            "head_count": 16,
            "head_count_kv": 1,
            "leading_dense_block_count": 1,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "key_length": 576,
            "value_length": 512,
            "key_length_mla": 192,
            "value_length_mla": 128,
            "rope_dimension_count": 64,
            "expert_count": 64,
            "expert_used_count": 6,
            "expert_feed_forward_length": 1408,
            "expert_shared_count": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": SIGMOID,
            "expert_group_count": 8,
            "expert_group_used_count": 4,
        },
        _v3_layer,
    ),
    "qwen3": Shape(
        "qwen3moe",
        6,
        {
            **_COMMON,
            "block_count": 6,
            "feed_forward_length": 6144,
            "head_count": 32,
            "head_count_kv": 4,
            "key_length": 128,
            "value_length": 128,
            "expert_count": 128,
            "expert_used_count": 8,
            "expert_feed_forward_length": 768,
        },
        _qwen3_layer,
    ),
}
