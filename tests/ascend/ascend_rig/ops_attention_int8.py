"""The second attention operator: semantics in full int8 over a paged latent cache, and of grouped-query attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .emulate import require, rules, semantics
from .formats import ND, format_of
from .ops_attention import LATENT, ROPE, attend, check_cumulative, check_mask, check_queries, paged_keys
from .ops_grouped import grouped_attention

PER_TOKEN_HEAD = 3
INT8_PAGE = 128


@semantics
def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    block_table: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    dequant_scale_key: Tensor | None = None,
    dequant_scale_value: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
) -> tuple[Tensor, Tensor]:
    """Both parts of a score are multiplied by the scales of query and key; the value's scale is one number."""
    name = "npu_fused_infer_attention_score_v2"
    if input_layout == "TND":
        require(query_rope is None and key_rope is None, f"{name}: rotary arguments in TND are not emulated")
        require(query_quant_mode == key_quant_mode == value_quant_mode == 0, f"{name}: quant modes in TND")
        for each in (dequant_scale_query, dequant_scale_key, dequant_scale_value):
            require(each is None, f"{name}: a scale in TND")
        require(actual_seq_qlen is not None and actual_seq_kvlen is not None, f"{name}: TND needs both lengths")
        check_cumulative(name, list(actual_seq_qlen or []), query.shape[0])
        check_mask(name, sparse_mode, atten_mask)
        lengths = (list(actual_seq_qlen or []), list(actual_seq_kvlen or []))
        sizes = (num_query_heads, num_key_value_heads, softmax_scale, block_size)
        out = grouped_attention(name, query, key, value, sparse_mode == 3, *lengths, block_table, *sizes)
        return out, torch.empty(0)
    require(input_layout in ("TND_NTD", "BSND_NBSD"), f"{name}: layout {input_layout!r} is not emulated")
    require(query_rope is not None and key_rope is not None, f"{name}: query_rope and key_rope come together")
    assert query_rope is not None and key_rope is not None and actual_seq_kvlen is not None
    rope_dtype = torch.float32 if rules.wide else torch.bfloat16
    for tensor, dtype in ((query, torch.int8), (key, torch.int8), (query_rope, rope_dtype), (key_rope, rope_dtype)):
        require(tensor.dtype == dtype, f"{name}: {tensor.dtype} where full int8 has {dtype}")
        require(tensor.is_contiguous() and format_of(tensor) == ND, f"{name}: strided or format 29 tensors")
    require(key.dim() == 5, f"{name}: full int8 reads NZ pages, not {tuple(key.shape)}")
    modes = (query_quant_mode, key_quant_mode, value_quant_mode)
    require(modes == (PER_TOKEN_HEAD, 0, 0), f"{name}: quant modes {modes} for full int8")
    by_token = input_layout == "TND_NTD"
    heads, width = query.shape[-2:]
    require(width == LATENT and heads == num_query_heads, f"{name}: query {tuple(query.shape)}")
    require(query_rope.shape == (*query.shape[:-1], ROPE), f"{name}: query_rope {tuple(query_rope.shape)}")
    query_scale = checked_scale(name, dequant_scale_query, tuple(query.shape[:-1]))
    key_scale, value_scale = (checked_scale(name, each, (1,)) for each in (dequant_scale_key, dequant_scale_value))
    check_mask(name, sparse_mode, atten_mask)
    if by_token:
        require(actual_seq_qlen is not None, f"{name}: TND needs the queries' lengths")
        ends = list(actual_seq_qlen or [])
        check_cumulative(name, ends, query.shape[0])
    else:
        require(query.shape[1] == 1 and actual_seq_qlen is None, f"{name}: BSND is emulated for one query each")
        ends = list(range(1, query.shape[0] + 1))
    require(block_size == INT8_PAGE, f"{name}: pages of {block_size}: full int8 reads pages of {INT8_PAGE} only")
    check_queries(name, [0, *ends[:-1]], ends)
    pages = (key, value, key_rope, block_table, list(actual_seq_kvlen), block_size, num_key_value_heads)
    keys = paged_keys(name, heads, len(ends), *pages)
    rows, scales = (
        torch.cat((query.float(), query_rope.float()), -1).view(-1, heads, width + ROPE),
        query_scale * key_scale,
    )
    scaled = rows * scales.view(-1, heads, 1)
    out = torch.zeros(len(rows), heads, width)
    for start, end, (k, v, kr) in zip([0, *ends[:-1]], ends, keys, strict=True):
        every = torch.cat((k.float(), kr.float()), -1)
        out[start:end], _ = attend(scaled[start:end], every, v.float() * value_scale, softmax_scale, sparse_mode == 3)
    by_head = out.to(rope_dtype).transpose(0, 1).contiguous()
    return by_head if by_token else by_head.unsqueeze(2), torch.empty(0)


def checked_scale(name: str, scale: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    require(scale is not None, f"{name}: full int8 takes the scales of query, key and value")
    assert scale is not None
    require(scale.dtype == torch.float32 and scale.shape == shape, f"{name}: scale {scale.dtype} {tuple(scale.shape)}")
    require(scale.is_contiguous(), f"{name}: strided tensors are not supported")
    return scale
