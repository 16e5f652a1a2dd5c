"""Cases of attention to all tokens, and of its cache."""

from __future__ import annotations

import torch

from ....formats.kv_cache import storable_scale
from ....formats.schemes import Scheme
from ...attention.pools import LayerCache
from ...ops import (
    Activation,
    Decode,
    Keys,
    Lengths,
    Mla,
    MlaConfig,
    Ops,
    Positions,
    Queries,
    Step,
)
from .data import (
    BLOCK,
    EPS,
    HEAD,
    HEADS,
    HIDDEN,
    LATENT,
    POOLS,
    ROPE,
    SCALE,
    TOKENS,
    Case,
    block_table,
    random_rows,
    random_values,
    rope_rows,
    written_cache,
)
from .layers import mla_parts


def rope_and_cache(ops: Ops) -> tuple[Activation, ...]:
    cos, sin = rope_rows(ops, TOKENS)
    rotated = ops.rotary.interleave_rope(random_rows(ops, TOKENS, HEADS, ROPE, seed=9), cos, sin)
    return rotated, *ops.caches.gather(written_cache(ops, TOKENS, first_block=2), block_table(ops, 2), TOKENS).values()


def ragged_attention(nope: int, value: int) -> Case:
    """Attention over decompressed keys of `nope` + ROPE channels and values of `value`, merged with another one."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        tokens, lengths = 9, (1, 4, 9)
        q, k = (random_rows(ops, tokens, HEADS, nope, seed=seed) for seed in (10, 11))
        queries = Queries(q, random_rows(ops, tokens, HEADS, ROPE, seed=13))
        keys = Keys(k, random_rows(ops, tokens, ROPE, seed=14), random_rows(ops, tokens, HEADS, value, seed=12))
        out, lse = ops.mla.fused_infer_attention(queries, keys, Lengths(lengths, lengths, causal=True), SCALE)
        whole = Lengths((tokens,), (tokens,), causal=False)
        past, past_lse = ops.mla.fused_infer_attention(queries, keys, whole, SCALE)
        return out, lse, past, ops.mla.attention_update([out, past], [lse, past_lse])

    return case


def paged_attention(ops: Ops) -> tuple[Activation, ...]:
    cache = written_cache(ops, BLOCK + 9, first_block=1)
    return *attend(ops, cache), *attend(ops, cache, heads=5)


def int8_layer(ops: Ops, heads: int, fused: bool) -> tuple[Mla, LayerCache]:
    """Weights and cache of a layer with an int8 cache. fused: in sizes that a fused prolog may take."""
    hidden, q_lora = (1024, 1536) if fused else (HIDDEN, 192)
    config = MlaConfig(heads, q_lora, LATENT, HEAD, ROPE, HEAD, EPS, SCALE)
    scale = storable_scale((3 + random_values(LATENT, seed=93).abs()) / 127)
    mla = ops.mla.load(mla_parts(Scheme.W8A8, hidden, q_lora, heads), config)
    return ops.mla.with_cache_scale(mla, scale), ops.caches.new(POOLS, 4, BLOCK, {"latent": scale})


def int8_cache_write(ops: Ops) -> tuple[Activation, ...]:
    """Keys and values of tokens, as their own chunk sees them and as later ones do; slots −1 are not written."""
    mla, cache = int8_layer(ops, HEADS, fused=False)
    slots = torch.tensor([2 * BLOCK, 2 * BLOCK + 1, -1, 2 * BLOCK + 3, 5, -1]).to(ops.device)
    positions = Positions(slots, *rope_rows(ops, TOKENS))
    written = ops.mla.write_cache(
        random_rows(ops, TOKENS, LATENT + ROPE, seed=92), mla, cache, positions, output_kv=True
    )
    assert written is not None
    k_rope, latent = written
    cached = ops.caches.gather(cache, block_table(ops, 2, 0), 2 * BLOCK)
    later = ops.mla.decompress(cached["latent"], cached["rope"], mla)
    return (*ops.mla.decompress(latent, k_rope, mla), *later)


def int8_attention(heads: int, fused: bool) -> Case:
    """A block of decode attention over an int8 cache, of two sequences with tokens before."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        mla, cache = int8_layer(ops, heads, fused)
        past = BLOCK + 9
        positions = Positions(torch.arange(past, device=ops.device) + BLOCK, *rope_rows(ops, past))
        ops.mla.write_cache(random_rows(ops, past, LATENT + ROPE, seed=95), mla, cache, positions, output_kv=False)
        slots = torch.tensor([2 * BLOCK + 9, 3 * BLOCK]).to(ops.device)
        table = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32).to(ops.device)
        decode = Decode(q_lens=(1, 2), kv_lens=(past + 1, 1), block_table=table)
        step = Step(slots, Positions(slots, *rope_rows(ops, 2)), decode=decode, prefill=None, output_rows=None)
        hidden = random_rows(ops, 2, 1024 if fused else HIDDEN, seed=25)
        attended = ops.mla.decode(hidden, mla, cache, step)
        several = Decode(q_lens=(2, 5), kv_lens=(past, 40), block_table=table)  # as when tokens are speculated
        q_nope, q_rope = random_rows(ops, 5, heads, HEAD, seed=15), random_rows(ops, 5, heads, ROPE, seed=16)
        q_latent = ops.mla.absorb(q_nope, mla)
        out = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, several, SCALE)
        return attended, ops.mla.bring_out(out, mla)

    return case


def attend(ops: Ops, cache: LayerCache, heads: int = HEADS) -> tuple[Activation, ...]:
    table = torch.tensor([[1, 2], [1, 0]], dtype=torch.int32).to(ops.device)
    decode = Decode(q_lens=(1, 2), kv_lens=(BLOCK + 9, 40), block_table=table)
    several = Decode(q_lens=(2, 5), kv_lens=decode.kv_lens, block_table=table)  # as when tokens are speculated
    q, q_rope = random_rows(ops, 5, heads, LATENT, seed=15), random_rows(ops, 5, heads, ROPE, seed=16)
    return (
        ops.mla.fused_infer_attention_paged(q[:2], q_rope[:2], cache, decode, SCALE),
        ops.mla.fused_infer_attention_paged(q, q_rope, cache, several, SCALE),
    )
