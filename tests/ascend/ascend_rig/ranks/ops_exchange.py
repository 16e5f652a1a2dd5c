"""Dispatch of tokens to the ranks of their experts, and the way back: semantics of the MC2 operators, over gloo.

Every documented limit of Atlas A2 ("fullmesh") and A3 (the default algorithm) is enforced. What a rank is given is
checked before anything is sent, and a refusal is sent in its place, so that all ranks refuse together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..emulate import RefusedError, poison, require, rules, semantics
from ..ops_norm import quantize_rows
from .communicators import Communicator, communicator

MB = 1 << 20
ASSIST = 128  # int32 words of a received row
MARK = 0x5EED
A2_RANKS = {2, 3, 4, 5, 6, 7, 8, 16, 32, 64, 128, 256}
# What dispatch and combine must be given alike, on all ranks and by both.
ALIKE = ("group_ep", "ep_world_size", "moe_expert_num", "global_bs", "comm_alg")
# What must not change from layer to layer either.
FIXED = ("group_ep", "ep_world_size", "global_bs")


@semantics
def npu_moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = {name: value for name, value in locals().items() if name in (*ALIKE, "ep_rank_id", "x_active_mask")}
    given |= {"expert_ids": expert_ids, "k": expert_ids.shape[1], "rows": x.shape[0], "quant_mode": quant_mode}
    name = "npu_moe_distribute_dispatch_v2"
    group = communicator(group_ep)

    def check() -> None:
        _check_common(name, group, given, x.shape[1])
        require(x.dtype in rules.floats, f"{name}: x is {x.dtype}")
        require(expert_ids.dtype == torch.int32 and expert_ids.dim() == 2, f"{name}: expert_ids {expert_ids.dtype}")
        require(expert_ids.shape[0] == x.shape[0], f"{name}: {expert_ids.shape[0]} ids for {x.shape[0]} tokens")
        inside = (expert_ids >= 0) & (expert_ids < moe_expert_num)
        require(bool(inside.all()), f"{name}: an expert id is out of range")
        require(all(len(set(row)) == len(row) for row in expert_ids.tolist()), f"{name}: an expert twice in a token")
        require(quant_mode in (0, 2), f"{name}: quant_mode {quant_mode}")
        require(expert_token_nums_type in (0, 1), f"{name}: expert_token_nums_type {expert_token_nums_type}")
        if rules.family == "A3":
            require(expert_scales is None, f"{name}: A3 takes no expert_scales")
        if expert_scales is not None:
            require(expert_scales.dtype == torch.float32, f"{name}: expert_scales are {expert_scales.dtype}")
            require(expert_scales.shape == expert_ids.shape, f"{name}: expert_scales {tuple(expert_scales.shape)}")
        require(group.sent is None, f"{name}: the combine of the last dispatch is missing")

    active = x.shape[0] if x_active_mask is None else int(x_active_mask.sum())
    mine = {**given, "x": x, "active": active, "scales": expert_scales}
    ranks = group.gather(_refusal(check) or mine)
    _check_alike(name, group, ranks)
    group.sent, group.calls = given, group.calls + 1

    each = moe_expert_num // ep_world_size
    first, k = ep_rank_id * each, expert_ids.shape[1]
    batch = global_bs or x.shape[0] * ep_world_size
    capacity = batch * min(each, k)
    # By expert, then by the rank that sends, then in that rank's order.
    places = [
        (expert, source, token, choice)
        for expert in range(each)
        for source, sent in enumerate(ranks)
        for token in range(sent["active"])
        for choice in range(k)
        if int(sent["expert_ids"][token, choice]) == first + expert
    ]
    rows = torch.stack([ranks[source]["x"][token] for _, source, token, _ in places]) if places else x[:0]
    counts = torch.tensor([sum(place[0] == expert for place in places) for expert in range(each)], dtype=torch.int64)
    scales = poison(capacity, dtype=torch.float32)
    if quant_mode == 2:
        largest = rows.float().abs().amax(-1)
        factor = torch.full_like(largest, 127.0) / largest  # a number over a tensor would be divided less exactly
        rows, scales[: len(places)] = quantize_rows(rows.float(), 1 / factor, rows.float() * factor.unsqueeze(-1))
    received = poison(capacity, x.shape[1], dtype=rows.dtype)
    received[: len(places)] = rows
    assist = torch.zeros(max(expert_ids.numel(), capacity * ASSIST), dtype=torch.int32)
    for row, (_, source, token, choice) in enumerate(places):
        assist[row * ASSIST : row * ASSIST + 5] = torch.tensor([MARK, group.calls, source, token, choice])
    by_source = [
        sum(place[:2] == (expert, source) for place in places)
        for expert in range(each)
        for source in range(ep_world_size)
    ]
    recv_counts = torch.tensor(by_source, dtype=torch.int32).cumsum(0).to(torch.int32)
    expanded_scales = torch.empty(0)
    if expert_scales is not None:
        more = torch.zeros(batch * 2 * k * (ep_world_size // 8), dtype=torch.int32)
        recv_counts = torch.cat([recv_counts, more])
        expanded_scales = poison(capacity, dtype=torch.float32)
        for row, (_, source, token, choice) in enumerate(places):
            expanded_scales[row] = ranks[source]["scales"][token, choice]
    totals = counts.cumsum(0) if expert_token_nums_type == 0 else counts
    return received, scales, assist, totals, recv_counts, torch.empty(0, dtype=torch.int32), expanded_scales


@semantics
def npu_moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    x_active_mask: Tensor | None = None,
    expand_scales: Tensor | None = None,
    global_bs: int = 0,
    comm_quant_mode: int = 0,
    comm_alg: str = "",
) -> Tensor:
    given = {name: value for name, value in locals().items() if name in (*ALIKE, "ep_rank_id", "x_active_mask")}
    given |= {"expert_ids": expert_ids, "k": expert_ids.shape[1], "rows": expert_ids.shape[0]}
    name = "npu_moe_distribute_combine_v2"
    group = communicator(group_ep)
    tokens, k = expert_ids.shape

    def check() -> None:
        _check_common(name, group, given, expand_x.shape[1])
        require(expand_x.dtype in rules.floats, f"{name}: expand_x is {expand_x.dtype}")
        require(group.sent is not None, f"{name}: no dispatch before it")
        assert group.sent is not None
        for key in (*ALIKE, "rows"):
            require(given[key] == group.sent[key], f"{name}: {key} {given[key]}, of the dispatch {group.sent[key]}")
        require(torch.equal(expert_ids, group.sent["expert_ids"]), f"{name}: expert_ids are not those of the dispatch")
        mask, before = x_active_mask, group.sent["x_active_mask"]
        same = mask is before is None or (mask is not None and before is not None and torch.equal(mask, before))
        require(same, f"{name}: x_active_mask is not that of the dispatch")
        batch = global_bs or tokens * ep_world_size
        each = moe_expert_num // ep_world_size
        capacity = batch * min(each, k)
        require(expand_x.shape[0] == capacity, f"{name}: {expand_x.shape[0]} rows of expand_x, not {capacity}")
        require(expert_scales.dtype == torch.float32, f"{name}: expert_scales are {expert_scales.dtype}")
        require(expert_scales.shape == expert_ids.shape, f"{name}: expert_scales {tuple(expert_scales.shape)}")
        require(comm_quant_mode == 0, f"{name}: comm_quant_mode {comm_quant_mode} changes the rows")
        require(assist_info_for_combine.numel() >= capacity * ASSIST, f"{name}: assist_info_for_combine is too short")
        require(bool((ep_send_counts[: each * ep_world_size].diff() >= 0).all()), f"{name}: ep_send_counts")
        if rules.family == "A2":
            require(expand_scales is not None and expand_scales.shape == (capacity,), f"{name}: A2 needs expand_scales")
        else:
            require(expand_scales is None, f"{name}: A3 takes no expand_scales")
        marks = assist_info_for_combine[::ASSIST][: int(ep_send_counts[each * ep_world_size - 1])]
        require(bool((marks == MARK).all()), f"{name}: assist_info_for_combine is not that of the dispatch")

    mine = {**given, "x": expand_x, "assist": assist_info_for_combine, "counts": ep_send_counts}
    ranks = group.gather(_refusal(check) or mine)
    _check_alike(name, group, ranks)
    group.sent = None
    chosen: dict[tuple[int, int], Tensor] = {}
    each = moe_expert_num // ep_world_size
    for sender in ranks:
        words = sender["assist"].view(-1)[: sender["x"].shape[0] * ASSIST].view(-1, ASSIST)
        for row in range(int(sender["counts"][each * ep_world_size - 1])):
            mark, call, source, token, choice = words[row, :5].tolist()
            require((mark, call) == (MARK, group.calls), f"{name}: assist_info_for_combine of another dispatch")
            if source == ep_rank_id:
                chosen[token, choice] = sender["x"][row]
    out = poison(tokens, expand_x.shape[1], dtype=expand_x.dtype)
    active = tokens if x_active_mask is None else int(x_active_mask.sum())
    for token in range(active):
        total = torch.zeros(expand_x.shape[1])
        for choice in range(k):
            total = total + expert_scales[token, choice] * chosen[token, choice].float()
        out[token] = total.to(out.dtype)
    return out


def _refusal(check: Callable[[], None]) -> RefusedError | None:
    try:
        check()
    except RefusedError as error:
        return error
    return None


def _check_common(name: str, group: Communicator, given: dict[str, Any], hidden: int) -> None:
    """Limits of one rank's call."""
    size, rank, experts, k = given["ep_world_size"], given["ep_rank_id"], given["moe_expert_num"], given["k"]
    require(size == group.size, f"{name}: ep_world_size {size} in a group of {group.size}")
    require(rank == group.rank, f"{name}: ep_rank_id {rank} on rank {group.rank}")
    require(1 <= experts <= 1024 and experts % size == 0, f"{name}: {experts} experts on {size} ranks")
    require(0 < k <= 16 and k <= experts, f"{name}: {k} experts a token")
    rows, mask = given["rows"], given["x_active_mask"]
    if rules.family == "A2":
        require(given["comm_alg"] == "fullmesh", f"{name}: comm_alg {given['comm_alg']!r} (A2: fullmesh is emulated)")
        require(size in A2_RANKS, f"{name}: A2 has no fullmesh of {size} ranks")
        require(0 < hidden <= 7168 and hidden % 32 == 0, f"{name}: {hidden} channels on A2")
        require(0 < rows <= 256, f"{name}: {rows} tokens on A2")
    else:
        require(given["comm_alg"] == "", f"{name}: comm_alg {given['comm_alg']!r} (A3: the default is emulated)")
        require(2 <= size <= 768, f"{name}: {size} ranks on A3")
        require(1024 <= hidden <= 8192, f"{name}: {hidden} channels on A3")
        require(0 < rows <= 512, f"{name}: {rows} tokens on A3")
        require(experts <= 2048, f"{name}: {experts} experts on A3")
    if mask is not None:
        require(mask.dtype == torch.bool and mask.shape == (rows,), f"{name}: x_active_mask {mask.dtype} {mask.shape}")
        require(bool((mask.int().diff() <= 0).all()), f"{name}: x_active_mask has a token behind one that is left out")
    needed = _buffer(size, experts // size, given, hidden)
    require(needed <= group.buffer * MB, f"{name}: a buffer of {needed} bytes is needed, HCCL has {group.buffer} MB")


def _check_alike(name: str, group: Communicator, ranks: list[dict[str, Any]]) -> None:
    """Limits that concern all ranks together."""
    for key in ALIKE:
        require(len({rank[key] for rank in ranks}) == 1, f"{name}: the ranks differ in {key}")
    rows = {rank["rows"] for rank in ranks}
    batch, size = ranks[0]["global_bs"], group.size
    if len(rows) == 1:
        require(batch in (0, max(rows) * size), f"{name}: global_bs {batch} of {size} ranks with {rows} tokens each")
    else:
        require(batch == max(rows) * size, f"{name}: global_bs {batch} for up to {max(rows)} tokens on {size} ranks")
        whole = all(rank["x_active_mask"] is None or bool(rank["x_active_mask"].all()) for rank in ranks)
        require(whole, f"{name}: x_active_mask leaves tokens out where the ranks have different numbers")
    for key in FIXED:
        require(group.fixed.setdefault(key, ranks[0][key]) == ranks[0][key], f"{name}: {key} changes between layers")


def _buffer(size: int, each: int, given: dict[str, Any], hidden: int) -> int:
    """Bytes of the buffer that the documentation asks for."""
    k = given["k"]
    rows = given["global_bs"] // size or given["rows"]
    if rules.family == "A2":
        return 2 * (rows * size * min(each, k) * hidden * 2 + 2 * MB)
    aligned = _align(_align(2 * hidden, 32) + 64, 512)
    return 2 * (each * rows * size * aligned + (k + 1) * rows * _align(2 * hidden, 512))


def _align(value: int, step: int) -> int:
    return -(-value // step) * step
