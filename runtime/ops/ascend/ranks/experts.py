"""The routed experts of a layer, divided over several NPUs.

A row, the output of one expert for one token, is computed on one rank and travels as it is. The rank of a token
combines its rows by the same operator as one NPU does, in the same order: results are equal bit by bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...handles import Activation, MoeWeights, Quantized
from ...routing import Routing
from ..device import ROWS_OF_EACH, Npu
from .communicator import Communicator
from .rules import Exchange, MoeShape, dispatch_tokens, exchange_of
from .slices import Slices

DYNAMIC_INT8, NOT_QUANTIZED = 1, -1  # quant_mode of init_routing_v2


class Sent(NamedTuple):
    """Rows that a rank dispatches: for each of them, k a token, where it is among all rows and whose copy it is.

    All slices are padded to the longest; `active` is true for the rows that are not padding.
    """

    tokens: Tensor  # int32 [rows]
    choices: Tensor  # int32 [rows], token · k + choice
    active: Tensor  # bool [rows]
    ones: Tensor  # float32 [rows, 1]


class DividedExperts:
    """Experts of a layer of which this rank has those of one range. communicator: None where no step dispatches."""

    def __init__(self, npu: Npu, routing: Routing, communicator: Communicator | None):
        self.npu, self.routing, self.group, self.communicator = npu, routing, routing.group, communicator
        # All layers of a step take the same.
        self._sent = lru_cache(maxsize=4)(self._make_sent)
        self._order = lru_cache(maxsize=4)(self._make_order)

    def run(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        """Run the experts of all tokens: as `Routing.moe_experts`, with the same tensors on all ranks."""
        tokens, k = expert_ids.shape
        exchange = self.exchange(tokens, MoeShape(self.group.size, weights.num_experts, hidden.shape[1], k))
        if exchange is Exchange.SUM:
            rows = self._summed(self._own_rows(hidden, expert_ids, weights))
            return self._combine(rows, slice(0, tokens), top_weights, expert_ids, shared)
        slices = Slices(tokens, self.group.size)
        own = slices.of(self.group.rank)
        if exchange is Exchange.DISPATCH:
            rows = self._dispatched(hidden, expert_ids, slices, weights)
        else:
            rows = self._scattered(self._own_rows(hidden, expert_ids, weights), expert_ids, slices, weights)
        out = self._combine(rows, own, top_weights, expert_ids, shared)
        return self.group.all_gather_rows(out, slices.counts)

    def exchange(self, tokens: int, shape: MoeShape) -> Exchange:
        """The exchange of a step of so many tokens."""
        most = 0
        if self.communicator is not None:
            most = dispatch_tokens(self.communicator.limits, shape, self.communicator.buffer)
        return exchange_of(tokens, self.group.size, most)

    def _combine(
        self, rows: Tensor, own: slice, top_weights: Tensor, expert_ids: Tensor, shared: Tensor | None
    ) -> Tensor:
        """Combine the rows of a slice of the tokens, which are in the order of tokens and choices."""
        if own.start == own.stop:
            return rows
        skip = None if shared is None else shared[own]
        order = self._order(rows.shape[0])
        return self.routing.moe_finalize_routing(rows, top_weights[own], order, expert_ids[own], skip)

    def _make_order(self, rows: int) -> Tensor:
        return torch.arange(rows, dtype=torch.int32, device=self.npu.device)

    def _own_rows(self, hidden: Tensor, expert_ids: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """The rows of this rank's experts: → (`[T·k, H]` in the order of tokens and choices, row index `[T·k]`).

        A row is anything where its index is −1: its expert is on another rank.
        """
        each = weights.num_experts // weights.ranks
        first = self.group.rank * each
        rows, row_index, group_list, scale = self.npu.operators.npu_moe_init_routing_v2(
            hidden,
            expert_ids,
            active_num=expert_ids.numel(),
            expert_num=weights.num_experts,
            expert_tokens_num_type=ROWS_OF_EACH,
            expert_tokens_num_flag=True,
            active_expert_range=[first, first + each],
            quant_mode=DYNAMIC_INT8 if weights.quantized else NOT_QUANTIZED,
        )
        out = self.routing.run_experts(Quantized(rows, scale) if weights.quantized else rows, group_list, weights)
        return out.index_select(0, row_index.clamp(min=0)), row_index

    def _summed(self, own: tuple[Tensor, Tensor]) -> Tensor:
        """All rows, on every rank. Bits are added as integers, to zeros: a float sum would lose the sign of a zero."""
        rows, row_index = own
        zeros = torch.zeros_like(rows)
        words = torch.where((row_index >= 0).unsqueeze(1), rows, zeros).view(torch.int32)
        return self.group.all_reduce_sum(words).view(rows.dtype)

    def _scattered(self, own: tuple[Tensor, Tensor], expert_ids: Tensor, slices: Slices, weights: MoeWeights) -> Tensor:
        """The rows of this rank's tokens.

        Every rank sends a place for every row, so that no rank needs to know how many rows another has: that would be a
        wait for the device. Of the places of a row, that from the rank of its expert is taken.
        """
        rows, k = own[0], expert_ids.shape[1]
        counts = [count * k for count in slices.counts]
        mine = counts[self.group.rank]
        received = self.group.all_to_all_rows(rows, counts, [mine] * self.group.size)
        owner = expert_ids[slices.of(self.group.rank)].flatten() // (weights.num_experts // weights.ranks)
        return received.index_select(0, owner * mine + self._order(mine))

    def _dispatched(self, hidden: Tensor, expert_ids: Tensor, slices: Slices, weights: MoeWeights) -> Tensor:
        """The rows of this rank's tokens, by the operators that communicate.

        A row is a token of its own here, with one expert and the weight 1: so `combine` returns each row as it came,
        and adds none. Rows travel in the compute dtype, since `dispatch` rounds otherwise than `init_routing` does.
        """
        assert self.communicator is not None
        sent = self._sent(slices, expert_ids.shape[1])
        ids = expert_ids.view(-1, 1).index_select(0, sent.choices)
        same = {
            "group_ep": self.communicator.name,
            "ep_world_size": self.group.size,
            "ep_rank_id": self.group.rank,
            "moe_expert_num": weights.num_experts,
            "x_active_mask": sent.active,
            "global_bs": 0,  # all ranks dispatch equally many rows
            "comm_alg": self.communicator.limits.comm_alg,
        }
        scales_travel = self.communicator.limits.scales_travel
        received, _, assist, group_list, counts, _, scales = self.npu.operators.npu_moe_distribute_dispatch_v2(
            hidden.index_select(0, sent.tokens),
            ids,
            expert_scales=sent.ones if scales_travel else None,
            expert_token_nums_type=ROWS_OF_EACH,
            **same,
        )
        rows: Activation = self._quantized(received) if weights.quantized else received
        combined: Tensor = self.npu.operators.npu_moe_distribute_combine_v2(
            self.routing.run_experts(rows, group_list, weights),
            ids,
            assist,
            counts,
            sent.ones,
            expand_scales=scales if scales_travel else None,
            **same,
        )
        return combined[: slices.counts[self.group.rank] * expert_ids.shape[1]]

    def _make_sent(self, slices: Slices, k: int) -> Sent:
        device, own = self.npu.device, slices.of(self.group.rank)
        rows = torch.arange(slices.longest * k, dtype=torch.int32, device=device)
        choices = (rows + own.start * k).clamp(max=slices.tokens * k - 1)
        active = rows < (own.stop - own.start) * k
        return Sent(choices // k, choices, active, torch.ones(rows.shape[0], 1, device=device))

    def _quantized(self, rows: Tensor) -> Quantized:
        """Quantize rows as `init_routing` does: by it, a row for each of so many experts, so that all stay in place."""
        count = rows.shape[0]
        codes, _, _, scale = self.npu.operators.npu_moe_init_routing_v2(
            rows,
            self._order(count).unsqueeze(1),
            active_num=count,
            expert_num=count,
            expert_tokens_num_type=ROWS_OF_EACH,
            expert_tokens_num_flag=True,
            active_expert_range=[0, count],
            quant_mode=DYNAMIC_INT8,
        )
        return Quantized(codes, scale)
