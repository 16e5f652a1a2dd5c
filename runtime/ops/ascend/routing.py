"""Routing to experts on torch_npu."""

from __future__ import annotations

from torch import Tensor

from ....errors import BackendError
from ...ranks.group import Group
from ..handles import Activation, Gating, MoeWeights, Quantized
from ..norms import Norms
from ..products import Products
from ..routing import Routing
from .device import ROWS_OF_EACH, Npu
from .fused_experts import FusedExperts
from .ranks.communicator import Communicator
from .ranks.experts import DividedExperts

ROW_ORDER = 2  # drop_pad_mode of finalize: row_index[t · k + j], as init_routing_v2 gives it (the default is columns)
DYNAMIC_INT8, NOT_QUANTIZED = 1, -1  # quant_mode of init_routing_v2


class AscendRouting(Routing):
    """Routing; the blocks around it are the default ones. communicator: of the ranks, if steps may dispatch."""

    def __init__(
        self,
        npu: Npu,
        norms: Norms,
        products: Products,
        group: Group,
        communicator: Communicator | None = None,
        fused_experts: bool = True,
    ):
        super().__init__(norms, products, group)
        self.npu = npu
        self.fused = FusedExperts(npu, norms, products, group, fused_experts)
        self.divided = DividedExperts(npu, self, communicator)

    def findings(self) -> list[str]:
        """Result of the trial of the fused experts. See `Ops.findings`."""
        if self.fused.works is None:
            return []
        way = "one operator" if self.fused.works else "two operators"
        return [f"gate and up of the experts and their activation take {way}"]

    def moe_of(self, weights: MoeWeights) -> MoeWeights:
        self.fused.takes(weights.gate_up)  # the trial, if it is the first
        return weights

    def experts_inner(self, rows: Activation, group_list: Tensor, weights: MoeWeights) -> Activation:
        if isinstance(rows, Quantized) and self.fused.takes(weights.gate_up):
            return self.fused.run(rows, weights.gate_up, group_list)
        return super().experts_inner(rows, group_list, weights)

    def moe(self, hidden: Tensor, weights: MoeWeights) -> Tensor:
        side, shared = self.npu.side, weights.shared
        # Ranks that divide the shared experts reduce their results, which must not overtake other reductions.
        if side is None or shared is None or self.group.size > 1 or not side.active:
            return super().moe(hidden, weights)
        dense = side.run(lambda: self.mlp(hidden, shared))
        top_weights, expert_ids = self.moe_gate(hidden, weights)
        rows, row_index = self.moe_rows(hidden, expert_ids, weights)
        side.join()
        return self.moe_finalize_routing(rows, top_weights, row_index, expert_ids, dense)

    def moe_experts(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        if weights.ranks == 1:
            return super().moe_experts(hidden, top_weights, expert_ids, weights, shared)
        return self.divided.run(hidden, top_weights, expert_ids, weights, shared)

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        check_gating(gating, bias is not None)
        sigmoid = gating.scoring == "sigmoid"
        if sigmoid == gating.renormalize:
            weights, ids, _ = self.npu.operators.npu_moe_gating_top_k(
                logits,
                gating.k,
                bias=bias,
                k_group=gating.k_group,
                group_count=gating.group_count,
                group_select_mode=gating.group_select_mode,
                renorm=0,
                norm_type=int(sigmoid),
                routed_scaling_factor=gating.scaling,
                eps=1e-20,
            )
            return weights, ids
        # Softmax over the chosen logits is softmax over all of them, normalised.
        weights, ids, _ = self.npu.operators.npu_moe_gating_top_k_softmax_v2(logits, k=gating.k, renorm=1)
        return (weights if gating.scaling == 1.0 else weights * gating.scaling), ids

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        rows, row_index, group_list, scale = self.npu.operators.npu_moe_init_routing_v2(
            x,
            expert_ids,
            active_num=expert_ids.numel(),
            expert_num=num_experts,
            expert_tokens_num_type=ROWS_OF_EACH,
            expert_tokens_num_flag=True,
            active_expert_range=[0, num_experts],
            quant_mode=DYNAMIC_INT8 if quantize else NOT_QUANTIZED,
        )
        return (Quantized(rows, scale) if quantize else rows), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        out: Tensor = self.npu.operators.npu_moe_finalize_routing(
            rows, skip, None, None, weights.to(self.npu.dtype), row_index, expert_ids, drop_pad_mode=ROW_ORDER
        )
        return out


def check_gating(gating: Gating, biased: bool) -> None:
    """Raise BackendError for a router that the NPU has no operator for.

    The sigmoid operator always normalises the weights; the softmax one normalises only without groups and bias.
    """
    sigmoid = gating.scoring == "sigmoid"
    if sigmoid != gating.renormalize and (sigmoid or biased or gating.group_count > 1):
        groups = f" in {gating.group_count} groups" if gating.group_count > 1 else ""
        raise BackendError(
            f"the NPU has no router that scores by {gating.scoring}{groups} with norm_topk_prob "
            f"{str(gating.renormalize).lower()}"
        )
