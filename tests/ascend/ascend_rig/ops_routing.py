"""Routing tokens to experts and back: semantics of the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .emulate import poison, require, rules, semantics
from .ops_norm import quantize_rows


@semantics
def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    name = "npu_moe_gating_top_k"
    tokens, experts = x.shape
    require(x.dtype == torch.float32 or x.dtype in rules.floats, f"{name}: x is {x.dtype}")
    require(experts <= 2048, f"{name}: {experts} experts")
    require(renorm == 0, f"{name}: renorm {renorm} (documented: only 0)")
    require(norm_type in (0, 1) and group_select_mode in (0, 1), f"{name}: norm_type or group_select_mode")
    require(group_count > 0 and experts % group_count == 0, f"{name}: {group_count} groups of {experts} experts")
    each = experts // group_count
    require(each > 2, f"{name}: {each} experts a group, more than 2 are needed")
    require((each + 31) // 32 * 32 * group_count <= 2048, f"{name}: groups of {each} do not fit")
    require(1 <= k_group <= group_count and 1 <= k <= each * k_group, f"{name}: k {k}, k_group {k_group}")
    if bias is not None:
        require(bias.dtype == x.dtype and bias.shape == (experts,), f"{name}: bias {bias.dtype} {tuple(bias.shape)}")
    scores = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    selection = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = selection.view(tokens, group_count, each)
        best = groups.topk(2, dim=-1).values.sum(-1) if group_select_mode == 1 else groups.amax(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, :k_group]
        masked = torch.ones(tokens, group_count, dtype=torch.bool).scatter_(1, kept, False)
        selection = groups.masked_fill(masked.unsqueeze(-1), float("-inf")).view(tokens, experts)
    chosen = selection.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    weights = weights * routed_scaling_factor
    unwritten = poison(tokens, experts, dtype=torch.float32)  # only with out_flag
    return weights.to(x.dtype), chosen.to(torch.int32), unwritten


@semantics
def npu_moe_gating_top_k_softmax_v2(x: Tensor, k: int = 1, renorm: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    name = "npu_moe_gating_top_k_softmax_v2"
    require(renorm in (0, 1) and k <= 1024 and k <= x.shape[1], f"{name}: renorm {renorm}, k {k}")
    logits = x.float()
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    probabilities = logits.gather(1, chosen).softmax(-1) if renorm else logits.softmax(-1).gather(1, chosen)
    return probabilities.to(x.dtype), chosen.to(torch.int32), torch.empty(0)


@semantics
def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    active_num: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] | None = None,
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = "npu_moe_init_routing_v2"
    tokens, k = expert_idx.shape
    require(expert_idx.dtype == torch.int32, f"{name}: expert_idx is {expert_idx.dtype}")
    require(x.dtype in rules.floats and x.shape[0] == tokens, f"{name}: x {x.dtype} {tuple(x.shape)}")
    require(drop_pad_mode == 0 and row_idx_type == 0, f"{name}: only dropless with gather indices is emulated")
    require(quant_mode in (-1, 1), f"{name}: quant_mode {quant_mode}")
    require(expert_tokens_num_type in (0, 1), f"{name}: expert_tokens_num_type {expert_tokens_num_type}")
    require(active_num in (-1, 0, tokens * k), f"{name}: active_num {active_num} for {tokens * k} rows")
    first, last = active_expert_range or (0, expert_num)
    require(0 <= first < last <= expert_num, f"{name}: active_expert_range {first} to {last} of {expert_num}")
    flat = expert_idx.flatten()
    require(bool((flat >= 0).all() and (flat < expert_num).all()), f"{name}: an expert id is out of range")
    active = (flat >= first) & (flat < last)
    order = flat.masked_fill(~active, expert_num).sort(stable=True).indices[: int(active.sum())]
    rows = poison(tokens * k, x.shape[1], dtype=x.dtype)  # rows behind the active ones are never written
    rows[: len(order)] = x[order // k]
    row_index = torch.full((tokens * k,), -1, dtype=torch.int32)
    row_index[order] = torch.arange(len(order), dtype=torch.int32)
    counts = torch.bincount(flat[active] - first, minlength=last - first)
    group_list = counts.cumsum(0) if expert_tokens_num_type == 0 else counts
    if not expert_tokens_num_flag:
        group_list = poison(dtype=torch.int64)
    scale = poison(tokens * k, dtype=torch.float32)
    if quant_mode == 1:
        wide = rows[: len(order)].float()
        largest = wide.abs().amax(-1) / 127
        rows = poison(tokens * k, x.shape[1], dtype=torch.int8)
        rows[: len(order)], scale[: len(order)] = quantize_rows(
            wide, largest, wide / largest.unsqueeze(-1), ties="away"
        )
    return rows, row_index, group_list, scale


@semantics
def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
) -> Tensor:
    name = "npu_moe_finalize_routing"
    rows = expanded_permuted_rows
    require(rows.dtype in rules.floats, f"{name}: rows are {rows.dtype}")
    require(scales is not None and bias is None, f"{name}: scales, and no bias, are emulated")
    assert scales is not None
    tokens, k = scales.shape
    require(scales.dtype == rows.dtype, f"{name}: scales are {scales.dtype}, rows {rows.dtype}")
    require(skip1 is not None or skip2 is None, f"{name}: skip2 without skip1")
    for skip in (skip1, skip2):
        require(skip is None or (skip.dtype == rows.dtype and skip.shape == (tokens, rows.shape[1])), f"{name}: skip")
    index = expanded_src_to_dst_row
    require(index.dtype == torch.int32 and index.shape == (tokens * k,), f"{name}: row index {tuple(index.shape)}")
    if export_for_source_row is not None:
        require(export_for_source_row.dtype == torch.int32, f"{name}: expert ids are {export_for_source_row.dtype}")
        require(export_for_source_row.shape == (tokens, k), f"{name}: expert ids {tuple(export_for_source_row.shape)}")
    require(drop_pad_mode in (0, 2), f"{name}: drop_pad_mode {drop_pad_mode}")
    places = index.view(tokens, k) if drop_pad_mode == 2 else index.view(k, tokens).t()
    out = sum((skip.float() for skip in (skip1, skip2) if skip is not None), torch.zeros(tokens, rows.shape[1]))
    for j in range(k):
        out = out + scales[:, j : j + 1].float() * rows[places[:, j].long()].float()
    return out.to(rows.dtype)
