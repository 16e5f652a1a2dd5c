"""Routing to experts on native kernels, and feed-forward blocks in one call each."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ....native.pointers import address, output
from ...ranks.group import Group
from ..handles import Activation, Gating, MlpWeights, MoeWeights, Quantized, own
from ..norms import Norms
from ..products import Products
from ..routing import Routing
from .blocks import NativeMoe, bias_address, native_moe
from .kernels import Kernels
from .weights import NativeLinear


class NativeRouting(Routing):
    """Experts, and the dense blocks beside them.

    Raises ValueError for tensors that do not have the dtypes and sizes of their call.
    """

    def __init__(self, kernels: Kernels, norms: Norms, products: Products, group: Group):
        super().__init__(norms, products, group)
        self._call, self.dtype, self._code = kernels.pool.call, kernels.dtype, kernels.dtype_code

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        tokens, experts = logits.shape
        weights, weights_to = output(torch.float32, tokens, gating.k)
        ids, ids_to = output(torch.int32, tokens, gating.k)
        self._call(
            "gating_top_k",
            address(logits, "gating_top_k", "logits", torch.float32, tokens, experts),
            bias_address(bias, "gating_top_k", experts),
            tokens,
            experts,
            *_rule(gating),
            weights_to,
            ids_to,
        )
        return weights, ids

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        x, expert_ids = x.contiguous(), expert_ids.contiguous()
        (tokens, k), cols = expert_ids.shape, x.shape[1]
        row_index, index_to = output(torch.int32, tokens * k)
        group_list, counts_to = output(torch.int64, num_experts)
        codes, to = output(torch.int8 if quantize else self.dtype, tokens * k, cols)
        scale, scale_to = output(torch.float32, tokens * k) if quantize else (None, None)
        self._call(
            "init_routing",
            address(x, "init_routing", "x", self.dtype, tokens, cols),
            self._code,
            cols,
            address(expert_ids, "init_routing", "expert_ids", torch.int32, tokens, k),
            tokens,
            k,
            num_experts,
            0,
            num_experts,
            index_to,
            counts_to,
            None if quantize else to,
            to if quantize else None,
            scale_to,
        )
        return codes if scale is None else Quantized(codes, scale), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        rows, weights, row_index = rows.contiguous(), weights.contiguous(), row_index.contiguous()
        skip = None if skip is None else skip.contiguous()
        (tokens, k), cols = weights.shape, rows.shape[1]
        out, to = output(self.dtype, tokens, cols)
        self._call(
            "finalize_routing",
            address(rows, "finalize_routing", "rows", self.dtype, tokens * k, cols),
            self._code,
            cols,
            address(weights, "finalize_routing", "weights", torch.float32, tokens, k),
            address(row_index, "finalize_routing", "row_index", torch.int32, tokens * k),
            tokens,
            k,
            None if skip is None else address(skip, "finalize_routing", "skip", self.dtype, tokens, cols),
            to,
        )
        return out

    def moe_of(self, weights: MoeWeights) -> MoeWeights:
        return native_moe(weights)

    def moe(self, hidden: Tensor, weights: MoeWeights) -> Tensor:
        if not isinstance(weights, NativeMoe):
            return super().moe(hidden, weights)
        hidden, tokens = hidden.contiguous(), hidden.shape[0]
        out, to = output(self.dtype, tokens, weights.outputs)
        start = address(hidden, "moe_layer", "x", self.dtype, tokens, weights.inputs)
        self._call("moe_layer", ctypes.byref(weights.block), start, self._code, tokens, to)
        return out

    def mlp(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        gate_up, down = weights.gate_up, weights.down
        if not isinstance(gate_up, NativeLinear) or not isinstance(down, NativeLinear):
            return super().mlp(hidden, weights)  # ranks divide it, or it is static
        hidden, tokens = hidden.contiguous(), hidden.shape[0]
        out, to = output(self.dtype, tokens, down.weights.outputs)
        start = address(hidden, "mlp", "x", self.dtype, tokens, gate_up.weights.cols)
        self._call("mlp", gate_up.address, down.address, start, self._code, tokens, to)
        return out

    def moe_gate(self, hidden: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        hidden, gating, tokens = hidden.contiguous(), weights.gating, hidden.shape[0]
        router = own(weights.router, NativeLinear)
        top_weights, weights_to = output(torch.float32, tokens, gating.k)
        ids, ids_to = output(torch.int32, tokens, gating.k)
        self._call(
            "moe_gate",
            router.address,
            bias_address(weights.correction_bias, "moe_gate", router.weights.outputs),
            address(hidden, "moe_gate", "x", self.dtype, tokens, router.weights.cols),
            self._code,
            tokens,
            *_rule(gating),
            weights_to,
            ids_to,
        )
        return top_weights, ids

    def moe_experts(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        if weights.ranks > 1:
            return super().moe_experts(hidden, top_weights, expert_ids, weights, shared)
        hidden, top_weights, expert_ids = hidden.contiguous(), top_weights.contiguous(), expert_ids.contiguous()
        shared = None if shared is None else shared.contiguous()
        gate_up, down, (tokens, k) = (
            own(weights.gate_up, NativeLinear),
            own(weights.down, NativeLinear),
            expert_ids.shape,
        )
        width = down.weights.outputs
        out, to = output(self.dtype, tokens, width)
        self._call(
            "moe_experts",
            gate_up.address,
            down.address,
            address(hidden, "moe_experts", "x", self.dtype, tokens, gate_up.weights.cols),
            self._code,
            address(top_weights, "moe_experts", "weights", torch.float32, tokens, k),
            address(expert_ids, "moe_experts", "expert_ids", torch.int32, tokens, k),
            tokens,
            k,
            None if shared is None else address(shared, "moe_experts", "shared", self.dtype, tokens, width),
            to,
        )
        return out

    def own_rows(self, hidden: Tensor, expert_ids: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor, Tensor]:
        hidden, expert_ids = hidden.contiguous(), expert_ids.contiguous()
        gate_up, down = own(weights.gate_up, NativeLinear), own(weights.down, NativeLinear)
        tokens, k = expert_ids.shape
        count = weights.num_experts // weights.ranks
        row_index, index_to = output(torch.int32, tokens * k)
        group_list, counts_to = output(torch.int64, weights.num_experts)
        out, to = output(self.dtype, tokens * k, down.weights.outputs)
        first = self.group.rank * count if weights.ranks > 1 else 0
        self._call(
            "expert_rows",
            gate_up.address,
            down.address,
            address(hidden, "expert_rows", "x", self.dtype, tokens, gate_up.weights.cols),
            self._code,
            address(expert_ids, "expert_rows", "expert_ids", torch.int32, tokens, k),
            tokens,
            k,
            weights.num_experts,
            first,
            index_to,
            counts_to,
            to,
        )
        rows = int(group_list[first : first + count].sum())
        return out[:rows], row_index, group_list


def _rule(gating: Gating) -> tuple[int | float, ...]:
    """Gating in the order of the kernels' arguments."""
    return (
        gating.k,
        gating.scoring == "sigmoid",
        gating.group_count,
        gating.k_group,
        gating.group_select_mode,
        gating.renormalize,
        gating.scaling,
    )
