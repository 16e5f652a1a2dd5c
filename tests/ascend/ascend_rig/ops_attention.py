"""Rotary embedding, the paged latent cache and attention: semantics of the operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .emulate import poison, require, rules, semantics
from .formats import FRACTAL_NZ, ND, format_of, to_nd
from .ops_attention_batch import batch_attention
from .ops_matmul import integer_matmul
from .ops_norm import quantize_rows, rms

LATENT, ROPE = 512, 64
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MASK_SIDE = 2048
MOST_QUERIES = 16  # of a sequence, in absorbed attention
PROLOG_HIDDEN = (1024, 2048, 3072, 4096, 5120, 6144, 7168, 7680, 8192)
PROLOG_Q_LORA = (1536, 2048)
UNMASKED = 2147483647


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs in, halves out, in float32."""
    wide = x.float()
    even, odd = wide[..., 0::2], wide[..., 1::2]
    return torch.cat((even, odd), -1) * cos.float() + torch.cat((-odd, even), -1) * sin.float()


@semantics
def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    name = "npu_interleave_rope"
    require(x.dim() == 4 and x.shape[3] == ROPE, f"{name}: x {tuple(x.shape)}, D must be {ROPE}")
    require(x.dtype in rules.floats, f"{name}: x is {x.dtype}")
    for table in (x, cos, sin):
        require(table.is_contiguous(), f"{name}: strided tensors are not supported")
        require(table.dtype == x.dtype, f"{name}: {table.dtype} tables for {x.dtype}")
    expected = {(x.shape[0], 1, x.shape[2], ROPE), (x.shape[0], 1, 1, ROPE)}
    require(tuple(cos.shape) in expected and cos.shape == sin.shape, f"{name}: cos {tuple(cos.shape)}")
    return rotate(x, cos, sin).to(x.dtype)


@semantics
def npu_rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half") -> Tensor:
    name = "npu_rotary_mul"
    require(rotary_mode in ("half", "interleave"), f"{name}: rotary_mode {rotary_mode!r}")
    require(input.dim() == r1.dim() == r2.dim() == 4, f"{name}: four dimensions each")
    batch, length, heads, width = input.shape  # BSND
    require(batch < 1000 and heads < 1000, f"{name}: {batch} batches of {heads} heads, not fewer than 1000")
    require(width < 896 and width % 2 == 0, f"{name}: D {width}")
    expected = {(1, length, 1, width), (batch, length, 1, width), tuple(input.shape)}
    require(r1.shape == r2.shape and tuple(r1.shape) in expected, f"{name}: r1 {tuple(r1.shape)}, r2 {tuple(r2.shape)}")
    for tensor in (input, r1, r2):
        require(tensor.dtype in (*rules.floats, torch.float32), f"{name}: {tensor.dtype}")
        require(tensor.dtype == input.dtype, f"{name}: {tensor.dtype} tables for {input.dtype}")
    if rotary_mode == "half":
        first, second = input.float().chunk(2, -1)
        across = torch.cat((-second, first), -1)
    else:  # pairs stay where they are
        require(batch * heads < 1000, f"{name}: {batch} · {heads} is not below 1000")
        even, odd = input.float()[..., 0::2], input.float()[..., 1::2]
        across = torch.stack((-odd, even), -1).flatten(-2)
    return (input.float() * r1.float() + across * r2.float()).to(input.dtype)


@semantics
def npu_kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    c_kv_scale: Tensor | None = None,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "npu_kv_rmsnorm_rope_cache"
    batch, heads, length, width = kv.shape
    require(kv.dtype in rules.floats, f"{name}: kv is {kv.dtype}")
    require(heads == 1 and width == LATENT + ROPE, f"{name}: kv {tuple(kv.shape)}")
    require(kv.is_contiguous(), f"{name}: a strided kv is allowed, but copied first")
    require(gamma.shape == (LATENT,) and gamma.dtype == kv.dtype, f"{name}: gamma {gamma.dtype} {tuple(gamma.shape)}")
    for table in (cos, sin):
        require(table.shape in ((batch, 1, length, ROPE), (batch, 1, 1, ROPE)), f"{name}: cos/sin {tuple(table.shape)}")
        require(table.dtype == kv.dtype, f"{name}: cos/sin {table.dtype}")
    require(cache_mode in ("PA", "PA_BNSD", "PA_NZ"), f"{name}: cache_mode {cache_mode!r} is not emulated")
    require(index.dtype == torch.int64 and index.shape == (batch * length,), f"{name}: index {index.dtype}")
    check_cache(name, k_cache, ROPE, kv.dtype)
    check_cache(name, ckv_cache, LATENT, kv.dtype if c_kv_scale is None else torch.int8)
    require(k_cache.shape[:2] == ckv_cache.shape[:2], f"{name}: the caches differ in pages")
    require(bool((index < k_cache.shape[0] * k_cache.shape[1]).all()), f"{name}: a slot lies past the cache")
    latent = (kv[..., :LATENT].float() * rms(kv[..., :LATENT], epsilon) * gamma.float()).to(kv.dtype)
    rope = rotate(kv[..., LATENT:], cos, sin).to(kv.dtype)
    rows = latent
    if c_kv_scale is not None:  # the rope's scale stays away: CANN's tiling takes one of the two
        if rules.paired_scales:
            raise RuntimeError(f"{name}: k_rope_scale and c_kv_scale must both be given (torch_npu's page)")
        require(c_kv_scale.dtype == torch.float32 and c_kv_scale.shape == (LATENT,), f"{name}: c_kv_scale")
        exact = kv[..., :LATENT].float() * rms(kv[..., :LATENT], epsilon) * gamma.float()
        rows = (exact * c_kv_scale).round().clamp(-128, 127).to(torch.int8)
    write_pages(k_cache, rope.reshape(-1, ROPE), index, cache_mode == "PA_NZ")
    write_pages(ckv_cache, rows.reshape(-1, LATENT), index, cache_mode == "PA_NZ")
    if not is_output_kv:
        rope, latent = poison(*rope.shape, dtype=kv.dtype), poison(*latent.shape, dtype=kv.dtype)
    return k_cache, ckv_cache, rope, latent


def check_cache(name: str, cache: Tensor, width: int, dtype: torch.dtype) -> None:
    require(
        cache.dim() == 4 and cache.shape[2:] == (1, width), f"{name}: cache {tuple(cache.shape)} for {width} channels"
    )
    require(cache.dtype == dtype, f"{name}: cache is {cache.dtype}")
    require(cache.is_contiguous() and format_of(cache) == ND, f"{name}: the cache must be a plain contiguous tensor")
    require(
        cache.shape[1] * cache.element_size() % 32 == 0, f"{name}: pages of {cache.shape[1]} are not 32-byte aligned"
    )


def write_pages(cache: Tensor, rows: Tensor, slots: Tensor, nz: bool) -> None:
    """rows `[T, D]` to their slots; a negative slot is skipped."""
    blocks, size, _, width = cache.shape
    kept = slots >= 0
    rows, slots = rows[kept], slots[kept]
    if nz:
        tile = 32 if cache.dtype == torch.int8 else 16
        tiles = cache.view(blocks, width // tile, size, tile)
        tiles[slots // size, :, slots % size] = rows.view(-1, width // tile, tile)
    else:
        cache.view(blocks * size, width)[slots] = rows


@semantics
def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: list[int] | None = None,
    actual_seq_lengths_kv: list[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    next_tokens: int = UNMASKED,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    name = "npu_fused_infer_attention_score"
    if input_layout == "BSND" and query_rope is None and key_rope is None and block_table is None:
        lengths, kv_lengths = (
            None if each is None else list(each) for each in (actual_seq_lengths, actual_seq_lengths_kv)
        )
        heads = (num_heads, num_key_value_heads)
        out, lse = batch_attention(name, query, key, value, atten_mask, lengths, kv_lengths, *heads, scale, sparse_mode)
        return out, lse if softmax_lse_flag else torch.empty(0)
    require(input_layout in ("TND", "TND_NTD"), f"{name}: layout {input_layout!r} is not emulated")
    require(query_rope is not None and key_rope is not None, f"{name}: query_rope and key_rope come together")
    require(actual_seq_lengths is not None and actual_seq_lengths_kv is not None, f"{name}: TND needs both lengths")
    assert query_rope is not None and key_rope is not None
    assert actual_seq_lengths is not None and actual_seq_lengths_kv is not None
    tokens, heads, width = query.shape
    require(query.dtype in rules.floats, f"{name}: query is {query.dtype}")
    for tensor in (query, key, value, query_rope, key_rope):
        require(tensor.is_contiguous(), f"{name}: strided tensors are not supported")
        require(tensor.dtype == query.dtype, f"{name}: {tensor.dtype} beside {query.dtype}")
        require(format_of(tensor) == ND, f"{name}: format 29 tensors are not taken; NZ pages are told by their rank")
    require(heads == num_heads, f"{name}: num_heads {num_heads} for query {tuple(query.shape)}")
    require(query_rope.shape == (tokens, heads, ROPE), f"{name}: query_rope {tuple(query_rope.shape)}")
    check_cumulative(name, list(actual_seq_lengths), tokens)
    check_mask(name, sparse_mode, atten_mask)
    starts = [0, *actual_seq_lengths[:-1]]
    if width == LATENT:
        require(not softmax_lse_flag, f"{name}: no softmax_lse with D = {LATENT}")
        pages = (key, value, key_rope, block_table, list(actual_seq_lengths_kv), block_size, num_key_value_heads)
        check_queries(name, starts, list(actual_seq_lengths))
        keys = paged_keys(name, heads, len(starts), *pages)
    else:
        require(width == 128, f"{name}: query D {width}, not 512 or 128")
        require(input_layout == "TND", f"{name}: layout {input_layout} with D = 128")
        require(block_table is None, f"{name}: paged keys with D = 128 are not emulated")
        require(num_key_value_heads in (0, heads), f"{name}: {num_key_value_heads} key heads for {heads}")
        keys = ragged_keys(name, heads, key, value, key_rope, list(actual_seq_lengths_kv))
        require(len(keys) == len(starts), f"{name}: {len(starts)} queries, {len(keys)} key sequences")
    out, lse = torch.zeros(tokens, heads, keys[0][1].shape[-1]), torch.full((tokens, heads, 1), float("inf"))
    for start, end, (k, v, kr) in zip(starts, actual_seq_lengths, keys, strict=True):
        rows = slice(start, end)
        queries = torch.cat((query[rows], query_rope[rows]), -1).float()
        out[rows], lse[rows] = attend(queries, torch.cat((k, kr), -1).float(), v.float(), scale, sparse_mode == 3)
    out = out.to(query.dtype)
    if input_layout == "TND_NTD":
        out = out.transpose(0, 1).contiguous()
    return out, lse if softmax_lse_flag else torch.empty(0)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """q `[T, N, D]`, k `[S, N or 1, D]`, v `[S, N or 1, V]` → (`[T, N, V]`, log-sum-exp `[T, N, 1]`), float32."""
    scores = torch.einsum("tnd,snd->tns", q, k.expand(-1, q.shape[1], -1)) * scale
    if causal:
        offset = k.shape[0] - q.shape[0]
        hidden = torch.arange(k.shape[0])[None, :] > torch.arange(q.shape[0])[:, None] + offset
        scores = scores.masked_fill(hidden.unsqueeze(1), float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(lse.isinf(), 0.0, (scores - lse).exp())
    return torch.einsum("tns,snv->tnv", weights, v.expand(-1, q.shape[1], -1)), lse


def check_cumulative(name: str, lengths: list[int], total: int) -> None:
    require(all(isinstance(length, int) for length in lengths), f"{name}: lengths are host integers")
    require(0 < len(lengths) <= 4096 and lengths[0] > 0, f"{name}: {lengths[:3]} must not begin with 0")
    require(lengths == sorted(lengths) and lengths[-1] == total, f"{name}: {lengths} is not cumulative up to {total}")


def check_queries(name: str, starts: list[int], ends: list[int]) -> None:
    most = max(end - start for start, end in zip(starts, ends, strict=True))
    require(most <= MOST_QUERIES, f"{name}: {most} queries of a sequence with D = {LATENT}, more than {MOST_QUERIES}")


def check_mask(name: str, sparse_mode: int, mask: Tensor | None) -> None:
    require(sparse_mode in (0, 3), f"{name}: sparse_mode {sparse_mode} is not emulated")
    if sparse_mode == 0:
        require(mask is None, f"{name}: a full mask is not emulated")
        return
    require(mask is not None, f"{name}: sparse_mode 3 needs the compressed mask")
    assert mask is not None
    require(mask.shape == (MASK_SIDE, MASK_SIDE), f"{name}: mask {tuple(mask.shape)}")
    require(mask.dtype in (torch.bool, torch.int8, torch.uint8), f"{name}: mask is {mask.dtype}")
    corner = torch.ones(64, 64).triu(1).bool()
    require(
        torch.equal(mask[:64, :64].bool(), corner), f"{name}: the mask must be 1 above the diagonal and 0 elsewhere"
    )


def paged_keys(
    name: str,
    heads: int,
    sequences: int,
    key: Tensor,
    value: Tensor,
    key_rope: Tensor,
    table: Tensor | None,
    lengths: list[int],
    size: int,
    kv_heads: int,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys, values and rope of each sequence `[S, 1, …]`, from the pages in the layout that their rank tells."""
    require(heads in HEADS and kv_heads == 1, f"{name}: {heads} query and {kv_heads} key heads with D = {LATENT}")
    require(table is not None, f"{name}: D = {LATENT} reads a paged cache")
    assert table is not None
    require(table.dtype == torch.int32 and table.dim() == 2, f"{name}: block_table is {table.dtype}")
    require(
        table.shape[0] == sequences == len(lengths), f"{name}: {len(lengths)} key lengths for {sequences} sequences"
    )
    require(size % 16 == 0 and 0 < size <= 1024, f"{name}: block_size {size}")
    require(key.data_ptr() == value.data_ptr(), f"{name}: key and value are both the latent cache")
    require(min(lengths) >= 0 and max(lengths) <= table.shape[1] * size, f"{name}: {lengths} overruns the block table")
    found = []
    for row, length in zip(table.tolist(), lengths, strict=True):
        blocks = row[: -(-length // size)]
        require(all(0 <= block < key.shape[0] for block in blocks), f"{name}: block_table holds {blocks}")
        pages = [read_pages(name, cache, width, blocks, size) for cache, width in ((key, LATENT), (key_rope, ROPE))]
        latent, rope = (page[:length].unsqueeze(1) for page in pages)
        found.append((latent, latent, rope))
    return found


def read_pages(name: str, cache: Tensor, width: int, blocks: list[int], size: int) -> Tensor:
    shape, tile = tuple(cache.shape[1:]), 32 if cache.dtype == torch.int8 else 16
    if shape == (1, width // tile, size, tile):
        return cache[blocks].permute(0, 1, 3, 2, 4).reshape(-1, width)
    require(
        shape in ((size, width), (1, size, width)), f"{name}: cache {tuple(cache.shape)} is neither NZ nor ND pages"
    )
    return cache[blocks].reshape(-1, width)


def ragged_keys(
    name: str, heads: int, key: Tensor, value: Tensor, key_rope: Tensor, lengths: list[int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    tokens = key.shape[0]
    require(
        key.shape == value.shape == (tokens, heads, 128), f"{name}: key {tuple(key.shape)}, value {tuple(value.shape)}"
    )
    require(key_rope.shape == (tokens, heads, ROPE), f"{name}: key_rope {tuple(key_rope.shape)}")
    check_cumulative(name, lengths, tokens)
    rows = [slice(start, end) for start, end in zip([0, *lengths], lengths, strict=False)]
    return [(key[row], value[row], key_rope[row]) for row in rows]


@semantics
def npu_attention_update(lse: list[Tensor], local_out: list[Tensor], update_type: int) -> tuple[Tensor, Tensor]:
    name = "npu_attention_update"
    require(len(lse) == len(local_out) and 1 <= len(lse) <= 16, f"{name}: {len(lse)} parts")
    for weight, part in zip(lse, local_out, strict=True):
        require(
            weight.dtype == torch.float32 and weight.dim() == 1, f"{name}: lse {weight.dtype} {tuple(weight.shape)}"
        )
        require(part.dim() == 2 and part.shape[0] == weight.shape[0], f"{name}: out {tuple(part.shape)}")
        require(part.shape[1] % 8 == 0 and 8 <= part.shape[1] <= 512, f"{name}: head_dim {part.shape[1]}")
        require(part.dtype in (*rules.floats, torch.float32), f"{name}: out is {part.dtype}")
    require(update_type in (0, 1), f"{name}: update_type {update_type}")
    total = torch.stack(lse).logsumexp(0)
    merged: Any = sum(
        part.float() * (weight - total).exp().unsqueeze(1) for weight, part in zip(lse, local_out, strict=True)
    )
    return merged.to(local_out[0].dtype), total if update_type else poison(*lse[0].shape, dtype=torch.float32)


@semantics
def npu_mla_prolog_v3(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    cache_index: Tensor | None = None,
    dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None,
    dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None,
    quant_scale_ckv: Tensor | None = None,
    rmsnorm_epsilon_cq: float = 1e-5,
    rmsnorm_epsilon_ckv: float = 1e-5,
    cache_mode: str = "PA_BSND",
    query_norm_flag: bool = False,
    weight_quant_mode: int = 0,
    kv_cache_quant_mode: int = 0,
    query_quant_mode: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = "npu_mla_prolog_v3"
    half = torch.bfloat16
    tokens, hidden = token_x.shape
    heads, nope, latent = weight_uk.shape
    q_lora = weight_dq.shape[1]
    require(hidden in PROLOG_HIDDEN, f"{name}: hidden size {hidden}")
    require(q_lora in PROLOG_Q_LORA, f"{name}: q_lora {q_lora}")
    require(heads in HEADS and nope in (128, 192) and latent == LATENT, f"{name}: weight_uk {tuple(weight_uk.shape)}")
    require(weight_quant_mode == 2, f"{name}: weight_quant_mode {weight_quant_mode} is not emulated")
    require(cache_mode in ("PA_NZ", "PA_BSND"), f"{name}: cache_mode {cache_mode!r}")
    for weight, shape in (
        (weight_dq, (hidden, q_lora)),
        (weight_uq_qr, (q_lora, heads * (nope + ROPE))),
        (weight_dkv_kr, (hidden, LATENT + ROPE)),
    ):
        require(
            weight.dtype == torch.int8 and weight.shape == shape, f"{name}: weight {tuple(weight.shape)}, not {shape}"
        )
        require(format_of(weight) == FRACTAL_NZ, f"{name}: the three int8 weights must be FRACTAL_NZ")
    require(format_of(weight_uk) == ND and weight_uk.dtype == half, f"{name}: weight_uk must be ND bfloat16")
    require(token_x.dtype == torch.int8 and token_x.is_contiguous(), f"{name}: token_x is {token_x.dtype}")
    for tensor, shape, dtype in (
        (rmsnorm_gamma_cq, (q_lora,), half),
        (rmsnorm_gamma_ckv, (LATENT,), half),
        (rope_sin, (tokens, ROPE), half),
        (rope_cos, (tokens, ROPE), half),
        (cache_index, (tokens,), torch.int64),
        (dequant_scale_x, (tokens, 1), torch.float32),
        (dequant_scale_w_dq, (1, q_lora), torch.float32),
        (dequant_scale_w_uq_qr, (1, heads * (nope + ROPE)), torch.float32),
        (dequant_scale_w_dkv_kr, (1, LATENT + ROPE), torch.float32),
    ):
        require(tensor is not None, f"{name}: an argument of shape {shape} is missing")
        assert tensor is not None
        require(
            tensor.shape == shape and tensor.dtype == dtype,
            f"{name}: {tuple(tensor.shape)} {tensor.dtype}, not {shape}",
        )
        require(tensor.is_contiguous(), f"{name}: strided tensors are not supported")
    modes = (kv_cache_quant_mode, query_quant_mode)
    require(modes in ((0, 0), (1, 1)), f"{name}: quant modes {modes} of cache and queries")
    full = modes == (1, 1)
    require((quant_scale_ckv is not None) == full, f"{name}: quant_scale_ckv belongs to kv_cache_quant_mode 1")
    if quant_scale_ckv is not None:
        one = quant_scale_ckv.dtype == torch.float32 and quant_scale_ckv.shape == (1,)
        require(one, f"{name}: quant_scale_ckv {quant_scale_ckv.dtype} {tuple(quant_scale_ckv.shape)}")
    check_cache(name, kv_cache, LATENT, torch.int8 if full else half)
    check_cache(name, kr_cache, ROPE, half)
    assert cache_index is not None and dequant_scale_x is not None and dequant_scale_w_dq is not None
    assert dequant_scale_w_uq_qr is not None and dequant_scale_w_dkv_kr is not None
    low = integer_matmul(token_x, to_nd(weight_dq)).float() * dequant_scale_w_dq * dequant_scale_x
    normed = low * rms(low, rmsnorm_epsilon_cq) * rmsnorm_gamma_cq.float()
    factor = 127.0 / normed.abs().amax(-1)
    codes, scale = quantize_rows(normed, 1 / factor, normed * factor.unsqueeze(-1))
    q = integer_matmul(codes, to_nd(weight_uq_qr)).float() * dequant_scale_w_uq_qr * scale.unsqueeze(1)
    content, rope = q.view(tokens, heads, nope + ROPE).split([nope, ROPE], dim=-1)
    query = torch.einsum("tnd,ndl->tnl", content.to(half).float(), weight_uk.float()).to(half).contiguous()
    query_rope = rotate(rope, rope_cos.unsqueeze(1), rope_sin.unsqueeze(1)).to(half)
    kv = integer_matmul(token_x, to_nd(weight_dkv_kr)).float() * dequant_scale_w_dkv_kr * dequant_scale_x
    compressed = kv[:, :LATENT] * rms(kv[:, :LATENT], rmsnorm_epsilon_ckv) * rmsnorm_gamma_ckv.float()
    query_scale = torch.zeros(1)
    if quant_scale_ckv is None:
        compressed = compressed.to(half)
    else:
        compressed = (compressed * quant_scale_ckv).round().clamp(-128, 127).to(torch.int8)
        wide = query.float()
        row_scale = wide.abs().amax(-1) / 127
        query, row_scale = quantize_rows(wide, row_scale, wide / row_scale.unsqueeze(-1))
        query_scale = row_scale.unsqueeze(-1)
        # One factor serves both parts of a score: the rope part is divided by what the other is multiplied with.
        exact = rotate(rope, rope_cos.unsqueeze(1), rope_sin.unsqueeze(1))
        query_rope = (exact * quant_scale_ckv / query_scale).to(half)
    write_pages(kv_cache, compressed, cache_index, cache_mode == "PA_NZ")
    write_pages(kr_cache, rotate(kv[:, LATENT:], rope_cos, rope_sin).to(half), cache_index, cache_mode == "PA_NZ")
    if query_norm_flag:
        return query, query_rope, query_scale, codes, scale.unsqueeze(1)
    # Outputs that this mode leaves out; their sizes follow torch_npu's rule for CANN before 8.5.
    return query, query_rope, query_scale, torch.zeros(1, dtype=torch.int8), torch.zeros(1)
