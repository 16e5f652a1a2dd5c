"""Mixtures of experts, and the dense feed-forward blocks beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ...errors import BackendError
from ..ranks.group import ALONE, Group
from .handles import Activation, Gating, MlpWeights, MoeWeights, Quantized, RowParallel
from .norms import Norms
from .products import Products


class Routing(ABC):
    """Operators that route tokens to experts and back, and composites of them with products and norms."""

    def __init__(self, norms: Norms, products: Products, group: Group = ALONE):
        self.norms, self.products, self.group = norms, products, group

    @abstractmethod
    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        """Choose k experts a token: → (weights float32 `[T, k]`, expert ids int32 `[T, k]`).

        logits float32 `[T, E]`, bias float32 `[E]` or None. Experts are in order of descending biased score,
        the lower index first among equals. All in float32.
        """

    @abstractmethod
    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        """Sort the T·k copies of the tokens by expert (stable).

        x `[T, H]`, expert_ids int32 `[T, k]` → (rows `[R, H]`; row_index int32 `[R]`, where flat copy t·k + j went;
        group_list int64 `[E]`, the number of rows of each expert). With `quantize` the rows come quantized per row:
        scale = max|x| / 127, codes = round-half-away(x / scale); a zero row gives zeros.
        """

    @abstractmethod
    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        """Combine rows: out[t] = skip[t] + Σ_j weights[t, j] · rows[row_index[t·k + j]] → `[T, H]`.

        In float32, rounded once. weights: float32 `[T, k]`, rounded to the compute dtype first. skip: `[T, H]`, the
        output of the shared experts, or None.
        """

    def mlp(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        """Run a dense or shared MLP: `[T, H]` → `[T, H]`. Ranks may divide its inner channels."""
        return self.products.row_parallel(self.mlp_inner(hidden, weights), weights.down)

    def mlp_inner(self, hidden: Tensor, weights: MlpWeights) -> Activation:
        """Compute the input of an MLP's last linear: `[T, H]` → `[T, I]`, of this rank's channels."""
        gate_up = clamped(self.products.linear(hidden, weights.gate_up), weights.limit)
        if not weights.quantized:
            return self.norms.swiglu(gate_up)
        if not isinstance(weights.down, RowParallel):
            return self.norms.dequant_swiglu_quant(gate_up)
        activated = self.norms.swiglu_float32(gate_up)
        largest = weights.down.inputs.group.all_reduce_max(self.norms.row_maximum(activated))
        return self.norms.swiglu_quant_by(activated, largest)

    def moe_of(self, weights: MoeWeights) -> MoeWeights:
        """Make the handle that `moe` takes. Override to lay weights out for a fused layer."""
        return weights

    def moe(self, hidden: Tensor, weights: MoeWeights) -> Tensor:
        """Run routed and shared experts: `[T, H]` → `[T, H]`."""
        dense = None if weights.shared is None else self.mlp(hidden, weights.shared)
        top_weights, expert_ids = self.moe_gate(hidden, weights)
        return self.moe_experts(hidden, top_weights, expert_ids, weights, dense)

    def hash_moe(self, hidden: Tensor, token_ids: Tensor, weights: MoeWeights) -> Tensor:
        """Run shared experts, and those that `weights.expert_table` has for the tokens' ids: `[T, H]` → `[T, H]`.

        token_ids: int64 `[T]`.
        """
        assert weights.expert_table is not None
        dense = None if weights.shared is None else self.mlp(hidden, weights.shared)
        expert_ids = weights.expert_table[token_ids].int()
        logits = self.products.router_logits(hidden, weights.router)
        return self.moe_experts(
            hidden, self.expert_weights(logits, expert_ids, weights.gating), expert_ids, weights, dense
        )

    def expert_weights(self, logits: Tensor, expert_ids: Tensor, gating: Gating) -> Tensor:
        """Weights of given experts, as `moe_gating_top_k` weighs those that it chooses: float32 `[T, k]`.

        Raises BackendError for a backend without this operator.
        """
        raise BackendError("this backend weighs no experts that a table chooses: take the reference backend")

    def moe_gate(self, hidden: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """Run the router: hidden `[T, H]` → (weights float32 `[T, k]`, expert ids int32 `[T, k]`)."""
        logits = self.products.router_logits(hidden, weights.router)
        return self.moe_gating_top_k(logits, weights.correction_bias, weights.gating)

    def moe_experts(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        """Sum the chosen experts of every token, weighted, and `shared` `[T, H]`: `[T, H]` → `[T, H]`."""
        out, row_index = self.moe_rows(hidden, expert_ids, weights)
        return self.moe_finalize_routing(out, top_weights, row_index, expert_ids, shared)

    def moe_rows(self, hidden: Tensor, expert_ids: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """Run the experts on their rows: hidden `[T, H]` → (out `[R, H]`, sorted by expert; row_index int32 `[R]`).

        Where ranks divide the experts, each runs the rows of its own and gathers those of the others. Rows are moved
        whole, so that all ranks hold the rows of one process.
        """
        rows, row_index, group_list = self.own_rows(hidden, expert_ids, weights)
        if weights.ranks > 1:
            rows = self.group.all_gather_rows(rows, group_list.view(weights.ranks, -1).sum(1).tolist())
        return rows, row_index

    def own_rows(self, hidden: Tensor, expert_ids: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Run this rank's experts on their rows.

        Returns out `[own rows, H]`; and of all experts row_index int32 `[R]` and group_list int64 `[E]`, as of
        `moe_init_routing`.
        """
        rows, row_index, group_list = self.moe_init_routing(
            hidden, expert_ids, weights.num_experts, quantize=weights.quantized
        )
        if weights.ranks == 1:
            return self.run_experts(rows, group_list, weights), row_index, group_list
        by_rank, rank = group_list.view(weights.ranks, -1), self.group.rank
        first, count = int(by_rank[:rank].sum()), int(by_rank[rank].sum())
        if count == 0:
            return hidden.new_empty(0, hidden.shape[1]), row_index, group_list
        own = self.run_experts(row_range(rows, first, count), by_rank[rank], weights)
        return own, row_index, group_list

    def run_experts(self, rows: Activation, group_list: Tensor, weights: MoeWeights) -> Tensor:
        """Run this rank's experts on rows sorted by expert: `[R, H]` → `[R, H]`. group_list: rows of each."""
        return self.products.grouped_matmul(self.experts_inner(rows, group_list, weights), weights.down, group_list)

    def experts_inner(self, rows: Activation, group_list: Tensor, weights: MoeWeights) -> Activation:
        """Compute the input of the experts' last linear: `[R, H]` → `[R, I]`.

        A backend may keep float32 from the product to the codes and round these twice, to float16 and to int8:
        `reference.routing.swiglu_quant_twice`.
        """
        gate_up = clamped(self.products.grouped_matmul(rows, weights.gate_up, group_list), weights.limit)
        return self.norms.dequant_swiglu_quant(gate_up) if weights.quantized else self.norms.swiglu(gate_up)


def row_range(rows: Activation, first: int, count: int) -> Activation:
    """Rows `[first, first + count)`, a view."""
    if isinstance(rows, Quantized):
        return Quantized(rows.codes.narrow(0, first, count), rows.scale.narrow(0, first, count))
    return rows.narrow(0, first, count)


def clamped(gate_up: Tensor, limit: float | None) -> Tensor:
    """Clamp the left half of `[rows, 2·I]` to `limit` at most, and the right half to ±`limit`; None: neither."""
    if limit is None:
        return gate_up
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.cat([gate.clamp(max=limit), up.clamp(-limit, limit)], dim=-1)
