"""Cases of grouped-query attention."""

from __future__ import annotations

import torch

from ....formats.schemes import Scheme
from ...attention.pools import Pool
from ...ops import Activation, Decode, GqaConfig, GqaParts, Lengths, Ops, Positions, Step
from ...ops.grouped_attention import KEY, VALUE
from .data import (
    BLOCK,
    EPS,
    HEAD,
    HEADS,
    HIDDEN,
    Case,
    gain,
    random_rows,
    random_values,
    stored_part,
)

KV_HEADS = 2
SCALE = HEAD**-0.5
POOLS = tuple(Pool(name, KV_HEADS * HEAD, layout="nd") for name in (KEY, VALUE))


def grouped_layer(scheme: Scheme, rope_dim: int, *, biases: bool) -> Case:
    """Two decodes and a later chunk of three tokens: norm, projections, rotation, cache, attention, output."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        config = GqaConfig(HEADS, KV_HEADS, HEAD, rope_dim, EPS, SCALE)
        widths = {"q": HEADS * HEAD, "k": KV_HEADS * HEAD, "v": KV_HEADS * HEAD}
        parts = GqaParts(
            **{name: stored_part(scheme, width, HIDDEN, seed=50 + width, name=name) for name, width in widths.items()},
            o=stored_part(scheme, HIDDEN, HEADS * HEAD, seed=53, name="o"),
            biases=tuple(random_values(width, seed=54) for width in widths.values()) if biases else None,  # type: ignore[arg-type]
            q_norm=1 + 0.1 * random_values(HEAD, seed=55),
            k_norm=1 + 0.1 * random_values(HEAD, seed=56),
        )
        gqa, cache = ops.gqa.load(parts, config), ops.caches.new(POOLS, 4, BLOCK)
        past = torch.arange(4 * BLOCK, device=ops.device)
        for seed, name in enumerate((KEY, VALUE)):
            cache[name].write(past, random_rows(ops, 4 * BLOCK, KV_HEADS * HEAD, seed=57 + seed))
        slots = torch.tensor([BLOCK + 20, 2 * BLOCK, 7, 8, 9]).to(ops.device)
        table = torch.tensor([[1, 0], [2, 0], [3, 0]], dtype=torch.int32).to(ops.device)
        decode = Decode(q_lens=(1, 2, 5), kv_lens=(21, 1, BLOCK + 10), block_table=table)
        positions = Positions(slots, *_rope_rows(ops, 5, rope_dim))
        step = Step(slots, positions, decode=decode, prefill=None, output_rows=None)
        x, residual = random_rows(ops, 5, HIDDEN, seed=59), random_rows(ops, 5, HIDDEN, seed=60)
        rows, total = ops.gqa.norm(x, residual, gain(ops, HIDDEN), EPS, gqa)
        output = ops.gqa.decode(rows, gqa, cache, step)
        return total, output, cache[KEY].at(slots), cache[VALUE].at(slots)

    return case


def grouped_prefill(ops: Ops) -> tuple[Activation, ...]:
    """Attention of two sequences to their own keys and values."""
    query = random_rows(ops, 9, HEADS, HEAD, seed=61)
    key, value = (random_rows(ops, 9, KV_HEADS, HEAD, seed=seed) for seed in (62, 63))
    return (ops.gqa.fused_infer_attention(query, key, value, Lengths((3, 9), (3, 9), causal=True), SCALE),)


def _rope_rows(ops: Ops, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = random_values(tokens, width // 2, seed=90).repeat(1, 2)
    return angles.cos().to(ops.dtype).to(ops.device), angles.sin().to(ops.dtype).to(ops.device)
