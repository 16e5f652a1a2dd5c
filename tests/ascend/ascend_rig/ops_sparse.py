"""Sparse attention: semantics of the lightning indexer and of attention to the tokens that it selects.

Limits: op-plugin's pages of the two operators. Both are emulated for queries in "TND" over pages in "PA_BSND".
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .emulate import require, rules, semantics
from .formats import ND, format_of
from .ops_attention import HEADS, LATENT, ROPE

INDEX_DIM, MOST_INDEX_HEADS = 128, 64
COUNTS = {*range(1, 2049), 3072, 4096, 5120, 6144, 7168, 8192}
MOST_PAGE = 1024
ABSORBED = 2


def check_plain(name: str, **tensors: Tensor) -> None:
    for argument, tensor in tensors.items():
        require(tensor.is_contiguous(), f"{name}: {argument}: strided tensors are not supported")
        require(format_of(tensor) == ND, f"{name}: {argument} is in FRACTAL_NZ")


def check_pages(name: str, argument: str, pages: Tensor, width: int, dtype: torch.dtype) -> None:
    expected = f"[blocks, block_size, 1, {width}]"
    require(pages.dim() == 4 and pages.shape[2:] == (1, width), f"{name}: {argument} {tuple(pages.shape)}: {expected}")
    size = pages.shape[1]
    require(size % 16 == 0 and 0 < size <= MOST_PAGE, f"{name}: {argument} has pages of {size} tokens")
    require(pages.dtype == dtype, f"{name}: {argument} is {pages.dtype}, the query {dtype}")


def sequences(
    name: str, tokens: int, size: int, blocks: int, q_lens: Tensor | None, kv_lens: Tensor | None, table: Tensor | None
) -> list[tuple[slice, int, Tensor]]:
    """Of each sequence its rows of queries, its number of keys and the slots of these int64 `[keys]`."""
    require(q_lens is not None, f"{name}: TND needs the lengths of queries")
    require(kv_lens is not None and table is not None, f"{name}: PA_BSND needs the lengths of keys and a block table")
    assert q_lens is not None and kv_lens is not None and table is not None
    for argument, tensor, rank in (
        ("query lengths", q_lens, 1),
        ("key lengths", kv_lens, 1),
        ("block_table", table, 2),
    ):
        require(tensor.dtype == torch.int32, f"{name}: {argument} are {tensor.dtype}")
        require(tensor.dim() == rank, f"{name}: {argument} {tuple(tensor.shape)}")
        check_plain(name, **{argument.replace(" ", "_"): tensor})
    ends, lengths = q_lens.tolist(), kv_lens.tolist()
    require(len(ends) == len(lengths) == table.shape[0], f"{name}: {len(ends)}, {len(lengths)}, {table.shape[0]} rows")
    require(ends == sorted(ends) and min(ends) >= 0, f"{name}: query lengths {ends} do not add up")
    require(ends[-1] == tokens, f"{name}: query lengths {ends} for {tokens} queries")
    found = []
    for (start, end), length, row in zip(pairwise([0, *ends]), lengths, table, strict=True):
        require(0 <= length <= table.shape[1] * size, f"{name}: {length} keys overrun the block table")
        require(end - start <= length, f"{name}: {end - start} queries of a sequence of {length} keys")
        used = row[: -(-length // size)].long()
        require(bool(((used >= 0) & (used < blocks)).all()), f"{name}: block_table holds {used.tolist()}")
        slots = (used[:, None] * size + torch.arange(size)).flatten()[:length]
        found.append((slice(start, end), length, slots))
    return found


@semantics
def npu_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
) -> tuple[Tensor, Tensor]:
    name = "npu_lightning_indexer"
    require(layout_query == "TND" and layout_key == "PA_BSND", f"{name}: {layout_query}, {layout_key} is not emulated")
    require(query.dim() == 3 and query.shape[2] == INDEX_DIM, f"{name}: query {tuple(query.shape)}: D is {INDEX_DIM}")
    tokens, heads, _ = query.shape
    require(query.dtype in rules.floats, f"{name}: query is {query.dtype}")
    require(0 < heads <= MOST_INDEX_HEADS, f"{name}: {heads} heads, more than {MOST_INDEX_HEADS}")
    require(weights.shape == (tokens, heads), f"{name}: weights {tuple(weights.shape)} for query {tuple(query.shape)}")
    require(weights.dtype in (query.dtype, torch.float32), f"{name}: weights are {weights.dtype}")
    require(sparse_count in COUNTS, f"{name}: sparse_count {sparse_count}")
    require(sparse_mode == 3, f"{name}: sparse_mode {sparse_mode} is not emulated")
    check_pages(name, "key", key, INDEX_DIM, query.dtype)
    check_plain(name, query=query, key=key, weights=weights)
    rows = key.view(-1, INDEX_DIM)
    selected = torch.full((tokens, 1, sparse_count), -1, dtype=torch.int32)
    each = (actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    for queries, length, slots in sequences(name, tokens, key.shape[1], key.shape[0], *each):
        products = torch.einsum("tnd,ud->tnu", query[queries].float(), rows[slots].float())
        scores = (products.clamp_min(0) * weights[queries].float().unsqueeze(-1)).sum(1)
        count = scores.shape[0]
        for row, score in enumerate(scores, start=queries.start):
            seen = length - count + row - queries.start + 1  # the right lower corner of the mask
            # In order of scores: only that valid indices come first is documented.
            best = score[:seen].sort(descending=True, stable=True).indices[:sparse_count]
            selected[row, 0, : len(best)] = best.int()
    return selected, torch.empty(0, dtype=query.dtype)


@semantics
def npu_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    attention_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "npu_sparse_flash_attention"
    require(layout_query == "TND" and layout_kv == "PA_BSND", f"{name}: {layout_query}, {layout_kv} is not emulated")
    require(attention_mode == ABSORBED, f"{name}: attention_mode {attention_mode}; only {ABSORBED} is supported")
    require(sparse_mode == 3, f"{name}: sparse_mode {sparse_mode} is not emulated")
    require(sparse_block_size == 1, f"{name}: sparse_block_size {sparse_block_size} is not emulated")
    require(query.dim() == 3 and query.shape[2] == LATENT, f"{name}: query {tuple(query.shape)}: D is {LATENT}")
    tokens, heads, _ = query.shape
    require(heads in HEADS, f"{name}: {heads} query heads")
    require(query.dtype in rules.floats, f"{name}: query is {query.dtype}")
    require(value is not None and key.data_ptr() == value.data_ptr(), f"{name}: key and value are the latent cache")
    require(query_rope is not None and key_rope is not None, f"{name}: query_rope and key_rope come together")
    assert query_rope is not None and key_rope is not None
    require(
        query_rope.shape == (tokens, heads, ROPE) and query_rope.dtype == query.dtype,
        f"{name}: query_rope {query_rope.dtype} {tuple(query_rope.shape)}",
    )
    check_pages(name, "key", key, LATENT, query.dtype)
    check_pages(name, "key_rope", key_rope, ROPE, query.dtype)
    require(key.shape[:2] == key_rope.shape[:2], f"{name}: key and key_rope differ in pages")
    shape = tuple(sparse_indices.shape)
    require(sparse_indices.dtype == torch.int32, f"{name}: sparse_indices are {sparse_indices.dtype}")
    require(len(shape) == 3 and shape[:2] == (tokens, 1), f"{name}: sparse_indices {shape} for {tokens} tokens")
    check_plain(name, query=query, key=key, query_rope=query_rope, key_rope=key_rope, sparse_indices=sparse_indices)
    valid = sparse_indices[:, 0] >= 0
    require(
        bool((valid[:, 1:] <= valid[:, :-1]).all()), f"{name}: valid sparse_indices must come before the invalid ones"
    )
    latents, ropes = key.view(-1, LATENT), key_rope.view(-1, ROPE)
    out = torch.zeros(tokens, heads, LATENT)
    each = (actual_seq_lengths_query, actual_seq_lengths_kv, block_table)
    for queries, length, slots in sequences(name, tokens, key.shape[1], key.shape[0], *each):
        count = queries.stop - queries.start
        for row in range(queries.start, queries.stop):
            found = sparse_indices[row, 0, valid[row]].long()
            require(bool((found < length).all()), f"{name}: a selected token lies past the {length} of its sequence")
            found = found[found < length - count + row - queries.start + 1]
            latent, rope = latents[slots[found]].float(), ropes[slots[found]].float()
            keys = torch.cat((latent, rope), -1)
            scores = torch.cat((query[row], query_rope[row]), -1).float() @ keys.T * scale_value
            out[row] = scores.softmax(-1) @ latent
    return out.to(query.dtype), torch.empty(0), torch.empty(0)
