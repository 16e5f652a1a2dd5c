"""Dispatch and combine against numpy: every rank knows what all ranks send, and works out what must come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .chips import Chips, as_on_npus
from .communicators import DEFAULT_BUFFER, open_communicator

TOKENS, HIDDEN, EXPERTS, K = 5, 1024, 8, 3
npu = torch.ops.npu


def exchange(quantized: bool, sums: bool) -> None:
    """Send tokens to experts that add their number to a row, and back; some tokens are left out on some ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    each = EXPERTS // size
    x, ids, weights, active = zip(*map(_inputs, range(size)), strict=True)
    with as_on_npus(Chips("A3")):
        same = {
            "group_ep": open_communicator(),
            "ep_world_size": size,
            "ep_rank_id": rank,
            "moe_expert_num": EXPERTS,
            "x_active_mask": torch.arange(TOKENS) < active[rank],
        }
        rows, scales, assist, counts, received, _, _ = npu.npu_moe_distribute_dispatch_v2(
            x[rank], ids[rank], quant_mode=2 if quantized else 0, expert_token_nums_type=0 if sums else 1, **same
        )
        own = range(rank * each, (rank + 1) * each)
        places = [
            (expert, source, token)
            for expert in own
            for source in range(size)
            for token in range(active[source])
            if expert in ids[source][token].tolist()
        ]
        wanted = [sum(expert == place[0] for place in places) for expert in own]
        assert counts.tolist() == (np.cumsum(wanted).tolist() if sums else wanted)
        assert rows.shape == (TOKENS * size * min(each, K), HIDDEN)
        sent = np.stack([x[source][token].float().numpy() for _, source, token in places])
        if quantized:
            factor = np.float32(127) / np.abs(sent).max(1)
            assert (rows[: len(places)].numpy() == np.rint(sent * factor[:, None])).all()
            np.testing.assert_array_equal(scales[: len(places)].numpy(), np.float32(1) / factor)
            rows = torch.zeros_like(rows, dtype=torch.bfloat16)
            rows[: len(places)] = torch.from_numpy(sent).bfloat16()
        else:
            assert (rows[: len(places)].float().numpy() == sent).all()
            assert rows[len(places) :].isnan().all()
        for row, (expert, _, _) in enumerate(places):
            rows[row] += expert
        out = npu.npu_moe_distribute_combine_v2(rows, ids[rank], assist, received, weights[rank], **same)
    for token in range(active[rank]):
        total = np.zeros(HIDDEN, np.float32)
        for choice in range(K):
            row = (x[rank][token] + int(ids[rank][token, choice])).float().numpy()
            total = total + weights[rank][token, choice].numpy() * row
        assert torch.equal(out[token], torch.from_numpy(total).bfloat16())
    assert out[active[rank] :].isnan().all()


def _inputs(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16()
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:K] for _ in range(TOKENS)]).int()
    return x, ids, torch.rand(TOKENS, K, generator=generator), (3, TOKENS, 0, 1)[rank]


@dataclass(frozen=True)
class Limit:
    """A dispatch outside the documentation, on chips that run it otherwise. uneven: rank 1 has a token more."""

    family: str = "A3"
    rows: int = 4
    hidden: int = 1024
    experts: int = 8
    k: int = 1
    buffer: int = DEFAULT_BUFFER
    uneven: bool = False
    x: torch.dtype = torch.bfloat16
    same_expert: bool = False
    options: tuple[tuple[str, Any], ...] = ()


def dispatch(limit: Limit) -> None:
    """Make the call."""
    rows = limit.rows + (limit.uneven and dist.get_rank())
    ids = torch.arange(limit.k, dtype=torch.int32).remainder(limit.experts).expand(rows, -1).contiguous()
    if limit.same_expert:
        ids = torch.zeros_like(ids)
    with as_on_npus(Chips(limit.family)):
        options = {"comm_alg": "fullmesh" if limit.family == "A2" else "", **dict(limit.options)}
        if options.get("x_active_mask") == "short":
            options["x_active_mask"] = torch.arange(rows) < 1
        npu.npu_moe_distribute_dispatch_v2(
            torch.zeros(rows, limit.hidden, dtype=limit.x),
            ids,
            open_communicator(limit.buffer),
            dist.get_world_size(),
            dist.get_rank(),
            limit.experts,
            **options,
        )
