"""Random inputs of the cases, made with the operators of the backend that runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....formats.schemes import Scheme, quantize_rows
from ....formats.static_w8a8 import input_scale_of, quantize_static
from ....quant.scales import Method
from ...attention.pools import LayerCache, Pool
from ...ops import (
    Activation,
    LinearPart,
    Ops,
    Positions,
    Static,
)
from ...ops.sparse_attention import INDEX_KEY

TOKENS, HIDDEN, INNER, HEADS, EXPERTS, TOP_K, BLOCK = 6, 256, 128, 4, 8, 2, 128
WIDE = 18432  # outputs of gate and up in a dense layer of DeepSeek-V3
LATENT, ROPE, HEAD = 512, 64, 128
EPS = 1e-6
INDEX_HEADS, INDEX_HEAD = 16, 128
POOLS = (Pool("latent", LATENT, int8=True), Pool("rope", ROPE))
SPARSE_POOLS = tuple(
    Pool(name, channels, layout="nd")
    for name, channels in (("latent", LATENT), ("rope", ROPE), (INDEX_KEY, INDEX_HEAD))
)
SCALE = (HEAD + ROPE) ** -0.5
DIVISION = (slice(0, 96), slice(96, HIDDEN))  # columns of two ranks

Case = Callable[[Ops], tuple[Activation, ...]]


def random_values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_rows(ops: Ops, *shape: int, seed: int = 0) -> Tensor:
    """Random activations in the compute dtype, on the device."""
    return random_values(*shape, seed=seed).to(ops.dtype).to(ops.device)


def random_weight(outputs: int, inputs: int, seed: int) -> Tensor:
    return random_values(outputs, inputs, seed=seed).div(inputs**0.5).bfloat16()


def stored_part(scheme: Scheme, outputs: int, inputs: int, seed: int, name: str = "selftest") -> LinearPart:
    weight = random_weight(outputs, inputs, seed)
    if scheme is Scheme.FLOAT:
        return LinearPart(name, scheme, weight)
    if scheme is Scheme.W8A8_STATIC:
        stored = quantize_static(weight.float(), -3.0, 4.0, Method.MINMAX).tensors
        static = Static(input_scale_of(stored), stored["deq_scale"], stored["quant_bias"])
        return LinearPart(name, scheme, stored["weight"], static=static)
    stored = quantize_rows(weight.float(), scheme, Method.MINMAX, row_parallel=False).tensors
    return LinearPart(name, scheme, stored["weight"], stored["weight_scale"], stored.get("scale_bias"))


def rope_rows(ops: Ops, tokens: int) -> tuple[Tensor, Tensor]:
    angles = random_values(tokens, ROPE // 2, seed=90).repeat(1, 2)
    return angles.cos().to(ops.dtype).to(ops.device), angles.sin().to(ops.dtype).to(ops.device)


def gain(ops: Ops, width: int) -> Tensor:
    return ops.weights.parameter(1 + 0.1 * random_values(width, seed=91), ops.dtype)


def new_cache(ops: Ops) -> LayerCache:
    return ops.caches.new(POOLS, 4, BLOCK)


def written_cache(ops: Ops, tokens: int, first_block: int) -> LayerCache:
    """Cache with `tokens` tokens, from the start of a block on."""
    cache = new_cache(ops)
    slots = torch.arange(tokens, device=ops.device) + first_block * BLOCK
    kv = random_rows(ops, tokens, LATENT + ROPE, seed=92)
    positions = Positions(slots, *rope_rows(ops, tokens))
    ops.mla.kv_rmsnorm_rope_cache(kv, gain(ops, LATENT), EPS, positions, cache, output_kv=False)
    return cache


def block_table(ops: Ops, *blocks: int) -> Tensor:
    return torch.tensor(blocks, dtype=torch.int32).to(ops.device)
