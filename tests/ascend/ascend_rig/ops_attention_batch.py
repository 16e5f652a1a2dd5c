"""Attention without rotary arguments over a batch of sequences, "BSND": part of the first attention operator."""

from __future__ import annotations

import torch
from torch import Tensor

from .emulate import require, rules
from .formats import ND, format_of

MOST_HEADS, MOST_CHANNELS = 256, 512


def batch_attention(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    lengths: list[int] | None,
    kv_lengths: list[int] | None,
    num_heads: int,
    num_key_value_heads: int,
    scale: float,
    sparse_mode: int,
) -> tuple[Tensor, Tensor]:
    """query `[B, S, N, D]`, key and value `[B, S, N, D]` → (`[B, S, N, D]`, log-sum-exp float32 `[B, N, S, 1]`)."""
    from .ops_attention import attend, check_mask

    require(query.dim() == key.dim() == value.dim() == 4, f"{name}: BSND has four dimensions")
    require(query.dtype in rules.floats, f"{name}: query is {query.dtype}")
    for tensor in (query, key, value):
        require(tensor.is_contiguous(), f"{name}: strided tensors are not supported")
        require(tensor.dtype == query.dtype, f"{name}: {tensor.dtype} beside {query.dtype}")
        require(format_of(tensor) == ND, f"{name}: format 29 tensors are not taken")
    batch, length, heads, channels = query.shape
    require(key.shape == value.shape, f"{name}: key {tuple(key.shape)} and value {tuple(value.shape)} have one shape")
    require(heads == num_heads <= MOST_HEADS, f"{name}: num_heads {num_heads} for query {tuple(query.shape)}")
    require(channels <= MOST_CHANNELS and channels % 16 == 0, f"{name}: D {channels}")
    require((key.shape[0], key.shape[3]) == (batch, channels), f"{name}: key {tuple(key.shape)}")
    require(num_key_value_heads in (0, heads) and key.shape[2] == heads, f"{name}: key heads {key.shape[2]}")
    require(lengths in (None, [length] * batch), f"{name}: shorter queries than {length} are not emulated: {lengths}")
    require(kv_lengths in (None, [key.shape[1]] * batch), f"{name}: shorter keys are not emulated: {kv_lengths}")
    check_mask(name, sparse_mode, mask)
    pairs = [
        attend(q.float(), k.float(), v.float(), scale, sparse_mode == 3)
        for q, k, v in zip(query, key, value, strict=True)
    ]
    out, lse = (torch.stack(part) for part in zip(*pairs, strict=True))
    return out.to(query.dtype), lse.transpose(1, 2).contiguous()
