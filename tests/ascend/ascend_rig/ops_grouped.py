"""Grouped-query attention: semantics of rotation in place, of writing ND pages, and of attention over them.

Limits: op-plugin's pages of `npu_apply_rotary_pos_emb`, `npu_scatter_pa_kv_cache` and
`npu_fused_infer_attention_score_v2` (layout "TND" without rotary arguments).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .emulate import require, rules, semantics
from .formats import ND, format_of

HEAD = 128
MOST_HEADS, MOST_GROUP, MOST_CHANNELS, MOST_PAGE = 256, 64, 65535, 1024


def check_plain(name: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name}: {argument}: strided tensors are not supported")
        require(format_of(tensor) == ND, f"{name}: {argument} is in FRACTAL_NZ")


@semantics
def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    name = "npu_apply_rotary_pos_emb"
    require(layout == "TND", f"{name}: layout {layout!r} is not emulated")
    require(rotary_mode == "half", f"{name}: rotary_mode {rotary_mode!r}: A2 and A3 rotate halves only")
    check_plain(name, query=query, key=key, cos=cos, sin=sin)
    require(query.dim() == key.dim() == 3, f"{name}: query {tuple(query.shape)}, key {tuple(key.shape)}")
    tokens, _, width = query.shape
    require(width in (64, 128), f"{name}: D {width}, neither 64 nor 128")
    require(key.shape[::2] == (tokens, width), f"{name}: key {tuple(key.shape)} beside query {tuple(query.shape)}")
    for table in (cos, sin):
        require(table.shape == (tokens, 1, width), f"{name}: cos or sin {tuple(table.shape)}")
    for tensor in (query, key, cos, sin):
        require(tensor.dtype in rules.floats and tensor.dtype == query.dtype, f"{name}: {tensor.dtype}")
    results = []
    for x in (query, key):
        first, second = x.float().chunk(2, -1)
        rotated = (x.float() * cos.float() + torch.cat((-second, first), -1) * sin.float()).to(x.dtype)
        x.copy_(rotated)  # in place
        results.append(rotated)
    return results[0], results[1]


@semantics
def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    cache_mode: str | None = "PA_NZ",
) -> None:
    name = "npu_scatter_pa_kv_cache"
    require(cache_mode == "Norm", f"{name}: cache_mode {cache_mode!r} writes NZ pages")
    check_plain(name, key=key, value=value, key_cache=key_cache, value_cache=value_cache, slots=slot_mapping)
    require(key.dim() == value.dim() == 3, f"{name}: key {tuple(key.shape)}, value {tuple(value.shape)}")
    require(key.shape[:2] == value.shape[:2], f"{name}: key {tuple(key.shape)}, value {tuple(value.shape)}")
    require(slot_mapping.dtype in (torch.int32, torch.int64), f"{name}: slots are {slot_mapping.dtype}")
    require(slot_mapping.shape == key.shape[:1], f"{name}: slots {tuple(slot_mapping.shape)} for key {len(key)}")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        require(cache.dim() == 4, f"{name}: a cache {tuple(cache.shape)}")
        require(cache.shape[2:] == rows.shape[1:], f"{name}: a cache {tuple(cache.shape)} for {tuple(rows.shape)}")
        require(cache.dtype == rows.dtype == key.dtype, f"{name}: {rows.dtype} into {cache.dtype}")
    slots = slot_mapping.tolist()
    most = key_cache.shape[0] * key_cache.shape[1]
    require(all(0 <= slot < most for slot in slots), f"{name}: slots {slots} of {most}")
    # The last block belongs to no sequence: there tokens may meet that are not cached, or pad a graph.
    kept = [slot for slot in slots if slot < most - key_cache.shape[1]]
    require(len({*kept}) == len(kept), f"{name}: slots {slots} are not distinct")
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(most, *rows.shape[1:])[slot_mapping.long()] = rows


def grouped_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    ends: list[int],
    kv_lengths: list[int],
    table: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    size: int,
) -> Tensor:
    """Attention over pages `[blocks, size, K·d]` if there is a block table, else over ragged keys `[S, K, d]`."""
    check_plain(name, query=query, key=key, value=value)
    tokens, count, width = query.shape
    require(query.dtype in rules.floats, f"{name}: query is {query.dtype}")
    require(key.dtype == value.dtype == query.dtype, f"{name}: {key.dtype}, {value.dtype} beside {query.dtype}")
    require(key.shape == value.shape, f"{name}: key {tuple(key.shape)}, value {tuple(value.shape)}")
    require(width == HEAD, f"{name}: D {width} in TND, not {HEAD}")
    require(count == heads and heads <= MOST_HEADS, f"{name}: {heads} query heads for query {tuple(query.shape)}")
    kv_heads = kv_heads or heads
    require(heads % kv_heads == 0 and heads // kv_heads <= MOST_GROUP, f"{name}: {heads} heads on {kv_heads}")
    if table is None:
        require(key.shape[1:] == (kv_heads, width), f"{name}: key {tuple(key.shape)} of {kv_heads} heads")
        require(kv_lengths == sorted(kv_lengths), f"{name}: key lengths {kv_lengths} are not running sums")
        require(kv_lengths[-1] == len(key), f"{name}: key lengths {kv_lengths} for {len(key)} keys")
        rows = [torch.arange(start, end) for start, end in pairwise([0, *kv_lengths])]
    else:
        require(table.dtype == torch.int32 and table.dim() == 2, f"{name}: block_table is {table.dtype}")
        require(size % 16 == 0 and 0 < size <= MOST_PAGE, f"{name}: block_size {size}")
        require(key.shape[1:] == (size, kv_heads * width), f"{name}: pages {tuple(key.shape)} of {kv_heads} heads")
        require(kv_heads * width <= MOST_CHANNELS, f"{name}: {kv_heads * width} channels")
        require(len(table) == len(kv_lengths), f"{name}: {len(kv_lengths)} key lengths for {len(table)} sequences")
        rows = []
        for blocks, length in zip(table, kv_lengths, strict=True):
            require(0 <= length <= len(blocks) * size, f"{name}: {length} keys overrun the block table")
            used = blocks[: -(-length // size)].long()
            require(bool(((used >= 0) & (used < len(key))).all()), f"{name}: block_table holds {used.tolist()}")
            rows.append((used[:, None] * size + torch.arange(size)).flatten()[:length])
    require(len(rows) == len(ends), f"{name}: {len(ends)} query sequences, {len(rows)} key sequences")
    keys, values = (each.view(-1, kv_heads, width) for each in (key, value))
    out = torch.zeros(tokens, heads, width)
    for (start, end), some in zip(pairwise([0, *ends]), rows, strict=True):
        wide = [each[some].float().repeat_interleave(heads // kv_heads, dim=1) for each in (keys, values)]
        scores = torch.einsum("tnd,snd->nts", query[start:end].float(), wide[0]) * scale
        if causal:
            seen = torch.arange(len(some)) <= torch.arange(end - start)[:, None] + len(some) - (end - start)
            scores = scores.masked_fill(~seen, -torch.inf)
        out[start:end] = torch.einsum("nts,snd->tnd", scores.softmax(-1).nan_to_num(0.0), wide[1])
    return out.to(query.dtype)
