"""Wrong calls of the exchange operators. A suffix "@1" means: on rank 1 alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..mutants import Change, mapped, setting, without

INIT, DISPATCH, COMBINE = (
    "npu_moe_init_routing_v2",
    "npu_moe_distribute_dispatch_v2",
    "npu_moe_distribute_combine_v2",
)


def shifted(bounds: list[int]) -> list[int]:
    return [bounds[0] - 1, bounds[1] - 1] if bounds[0] else [bounds[0] + 1, bounds[1] + 1]


def later(where: int | str, function: Callable[[Any], Any]) -> Change:
    """One argument changed, on rank 1 alone."""
    change = mapped(where, function)
    return lambda args, kwargs: change(args, kwargs) if dist.get_rank() == 1 else (args, kwargs)


ALL_RANKS: dict[str, tuple[str, Change]] = {
    "experts of the next range": (INIT, mapped("active_expert_range", shifted)),
    "experts of all ranks": (INIT, lambda a, k: (a, {**k, "active_expert_range": [0, k["expert_num"]]})),
    "range left out": (INIT, without("active_expert_range")),
    "counts of rows left out": (INIT, without("expert_tokens_num_flag")),
    "running sums of rows": (INIT, without("expert_tokens_num_type")),
    "rows not quantized": (INIT, without("quant_mode")),
}
BOTH = (DISPATCH, COMBINE)
DISPATCH_ONLY: dict[str, tuple[str | tuple[str, ...], Change]] = {
    "no masks": (BOTH, without("x_active_mask")),
    "masks of all": (BOTH, mapped("x_active_mask", torch.ones_like)),
    "global batch of one rank in both": (BOTH, setting(global_bs=28)),
    "half the experts in both": (BOTH, mapped("moe_expert_num", lambda experts: experts // 2)),
    "global batch of one rank": (DISPATCH, lambda a, k: (a, {**k, "global_bs": a[0].shape[0]})),
    "global batch of the tokens": (DISPATCH, setting(global_bs=13)),
    "no mask": (DISPATCH, without("x_active_mask")),
    "no mask on the way back": (COMBINE, without("x_active_mask")),
    "mask of all": (DISPATCH, mapped("x_active_mask", torch.ones_like)),
    "mask with holes": (DISPATCH, mapped("x_active_mask", lambda mask: mask.flip(0))),
    "mask of bytes": (DISPATCH, mapped("x_active_mask", lambda mask: mask.to(torch.uint8))),
    "rank of another": (DISPATCH, mapped("ep_rank_id", lambda rank: 1 - rank)),
    "rank of another on the way back": (COMBINE, mapped("ep_rank_id", lambda rank: 1 - rank)),
    "one rank more": (DISPATCH, mapped("ep_world_size", lambda size: size + 1)),
    "experts of a rank for those of all": (DISPATCH, mapped("moe_expert_num", lambda experts: experts // 2)),
    "another group": (DISPATCH, setting(group_ep="default")),
    "codes by the operator's own rounding": (DISPATCH, setting(quant_mode=2)),
    "algorithm of the other family": (DISPATCH, mapped("comm_alg", lambda name: "" if name else "fullmesh")),
    "running sums": (DISPATCH, setting(expert_token_nums_type=0)),
    "ids int64": (DISPATCH, mapped(1, lambda ids: ids.long())),
    "ids of other rows on the way back": (COMBINE, mapped(1, lambda ids: ids.roll(1, 0))),
    "assist info of nothing": (COMBINE, mapped(2, torch.zeros_like)),
    "assist info of the next row": (COMBINE, mapped(2, lambda words: words.roll(128))),
    "no weights": (COMBINE, mapped(4, torch.zeros_like)),
    "weights in bf16": (COMBINE, mapped(4, lambda weights: weights.bfloat16())),
    "rows in int8 on the way back": (COMBINE, setting(comm_quant_mode=2)),
    "rows of another expert": (COMBINE, mapped(0, lambda rows: rows.roll(1, 0))),
}
# The ranks differ: all must refuse, or show it.
ONE_RANK: dict[str, tuple[str, Change]] = {
    "global batch on one rank": (DISPATCH, later("global_bs", lambda batch: 4096)),
    "mask of more on one rank": (DISPATCH, later("x_active_mask", torch.ones_like)),
}
RANGE_ON_ONE_RANK: dict[str, tuple[str, Change]] = {
    "range of rank 0 on rank 1": (INIT, later("active_expert_range", lambda bounds: [0, bounds[1] - bounds[0]])),
}
A2_ONLY: dict[str, tuple[str, Change]] = {
    "expert scales left out": (DISPATCH, without("expert_scales")),
    "expanded scales left out": (COMBINE, without("expand_scales")),
}


def of(name: str) -> tuple[str | tuple[str, ...], Change]:
    return (ALL_RANKS | DISPATCH_ONLY | ONE_RANK | RANGE_ON_ONE_RANK | A2_ONLY)[name]
