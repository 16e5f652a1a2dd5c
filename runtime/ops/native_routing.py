"""Native kernels' side of the CPU's operators: routing to experts, and feed-forward blocks in one call each."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...quant.native import MoeBlock
from . import Activation, Gating, MlpWeights, MoeWeights, Quantized
from .native_products import NativeProducts
from .native_weights import NativeLinear, native_moe


class NativeRouting(NativeProducts):
    """Experts, and the dense blocks beside them."""

    def __init__(self, dtype: torch.dtype, threads: int | None, level: str | None):
        super().__init__(dtype, threads, level)
        # By identity; what the key names is kept beside the block, so that no other object can come to have its name.
        self._moe_blocks: dict[tuple[int, int], tuple[MoeBlock | None, MoeWeights, MlpWeights | None]] = {}

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        tokens, experts = logits.shape
        weights, ids = torch.empty(tokens, gating.k), torch.empty(tokens, gating.k, dtype=torch.int32)
        self.pool.call(
            "gating_top_k",
            logits.data_ptr(),
            None if bias is None else bias.data_ptr(),
            tokens,
            experts,
            *_rule(gating),
            weights.data_ptr(),
            ids.data_ptr(),
        )
        return weights, ids

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        x, expert_ids = x.contiguous(), expert_ids.contiguous()
        (tokens, k), cols = expert_ids.shape, x.shape[1]
        row_index = torch.empty(tokens * k, dtype=torch.int32)
        group_list = torch.empty(num_experts, dtype=torch.int64)
        codes = torch.empty(tokens * k, cols, dtype=torch.int8 if quantize else self.dtype)
        scale = torch.empty(tokens * k) if quantize else None
        self.pool.call(
            "init_routing",
            x.data_ptr(),
            self._code,
            cols,
            expert_ids.data_ptr(),
            tokens,
            k,
            num_experts,
            row_index.data_ptr(),
            group_list.data_ptr(),
            None if quantize else codes.data_ptr(),
            codes.data_ptr() if quantize else None,
            None if scale is None else scale.data_ptr(),
        )
        return codes if scale is None else Quantized(codes, scale), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        rows, weights, row_index = rows.contiguous(), weights.contiguous(), row_index.contiguous()
        skip = None if skip is None else skip.contiguous()
        (tokens, k), cols = weights.shape, rows.shape[1]
        out = torch.empty(tokens, cols, dtype=self.dtype)
        self.pool.call(
            "finalize_routing",
            rows.data_ptr(),
            self._code,
            cols,
            weights.data_ptr(),
            row_index.data_ptr(),
            tokens,
            k,
            None if skip is None else skip.data_ptr(),
            out.data_ptr(),
        )
        return out

    # ---- composites: several operators a call, of the same results -------------------------------------------------

    def moe(self, hidden: Tensor, weights: MoeWeights, shared: MlpWeights | None) -> Tensor:
        key = id(weights), id(shared)
        if key not in self._moe_blocks:
            self._moe_blocks[key] = native_moe(weights, shared), weights, shared
        block = self._moe_blocks[key][0]
        if block is None:
            return super().moe(hidden, weights, shared)
        hidden = hidden.contiguous()
        out = torch.empty(hidden.shape[0], weights.down.weights.outputs, dtype=self.dtype)
        self.pool.call("moe_layer", ctypes.byref(block), hidden.data_ptr(), self._code, hidden.shape[0], out.data_ptr())
        return out

    def mlp(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        gate_up, down = weights.gate_up, weights.down
        if not isinstance(gate_up, NativeLinear) or not isinstance(down, NativeLinear):
            return super().mlp(hidden, weights)
        hidden = hidden.contiguous()
        out = torch.empty(hidden.shape[0], down.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "mlp",
            gate_up.address,
            down.address,
            hidden.data_ptr(),
            self._code,
            hidden.shape[0],
            out.data_ptr(),
        )
        return out

    def moe_gate(self, hidden: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        hidden, gating, bias, tokens = hidden.contiguous(), weights.gating, weights.correction_bias, hidden.shape[0]
        top_weights, ids = torch.empty(tokens, gating.k), torch.empty(tokens, gating.k, dtype=torch.int32)
        self.pool.call(
            "moe_gate",
            weights.router.address,
            None if bias is None else bias.data_ptr(),
            hidden.data_ptr(),
            self._code,
            tokens,
            *_rule(gating),
            top_weights.data_ptr(),
            ids.data_ptr(),
        )
        return top_weights, ids

    def moe_experts(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        hidden, top_weights, expert_ids = hidden.contiguous(), top_weights.contiguous(), expert_ids.contiguous()
        shared = None if shared is None else shared.contiguous()
        tokens, k = expert_ids.shape
        out = torch.empty(tokens, weights.down.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "moe_experts",
            weights.gate_up.address,
            weights.down.address,
            hidden.data_ptr(),
            self._code,
            top_weights.data_ptr(),
            expert_ids.data_ptr(),
            tokens,
            k,
            None if shared is None else shared.data_ptr(),
            out.data_ptr(),
        )
        return out


def _rule(gating: Gating) -> tuple[int | float, ...]:
    """A router's rule in the order of the kernels' arguments."""
    return (
        gating.k,
        gating.scoring == "sigmoid",
        gating.group_count,
        gating.k_group,
        gating.group_select_mode,
        gating.renormalize,
        gating.scaling,
    )
