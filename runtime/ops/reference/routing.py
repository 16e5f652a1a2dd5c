"""Routing to experts in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ranks.group import ALONE, Group
from ..handles import Activation, Gating, Quantized
from ..norms import Norms
from ..products import Products
from ..routing import Routing
from .norms import nonzero, row_maximum


class ReferenceRouting(Routing):
    """Routing on the CPU. dtype: the compute dtype."""

    def __init__(self, dtype: torch.dtype, norms: Norms, products: Products, group: Group = ALONE):
        super().__init__(norms, products, group)
        self.dtype = dtype

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        scores, choice = router_scores(logits, bias, gating)
        if gating.group_count > 1:
            choice = _keep_best_groups(choice, gating)
        ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : gating.k]
        return _weights(scores, ids, gating), ids.int()

    def expert_weights(self, logits: Tensor, expert_ids: Tensor, gating: Gating) -> Tensor:
        return _weights(router_scores(logits, None, gating)[0], expert_ids.long(), gating)

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        order = expert_ids.flatten().sort(stable=True).indices
        rows = x[order // expert_ids.shape[1]]
        row_index = torch.empty_like(order, dtype=torch.int32)
        row_index[order] = torch.arange(len(order), dtype=torch.int32)
        group_list = torch.bincount(expert_ids.flatten(), minlength=num_experts)
        if not quantize:
            return rows, row_index, group_list
        values = rows.float()
        scale = row_maximum(values) / 127.0
        quotient = (values / nonzero(scale)).nan_to_num(0.0)
        whole = quotient.trunc()
        # Not floor(|q| + ½): that sum rounds up for the float just below ½.
        codes = whole + ((quotient - whole).abs() >= 0.5) * quotient.sign()
        return Quantized(codes.to(torch.int8), scale), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        tokens, k = weights.shape
        chosen = rows[row_index.long()].view(tokens, k, -1).float()
        factors = weights.to(self.dtype).float()
        out = torch.zeros_like(chosen[:, 0]) if skip is None else skip.float()
        for j in range(k):
            out = out + factors[:, j, None] * chosen[:, j]
        return out.to(self.dtype)


def router_scores(logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
    """Scores that weigh experts, and biased scores that choose them, float32 `[T, E]` each; all groups are in."""
    scores = _SCORES[gating.scoring](logits)
    return scores, scores if bias is None else scores + bias


_SCORES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "sigmoid": Tensor.sigmoid,
    "softmax": lambda logits: logits.softmax(-1),
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}


def _weights(scores: Tensor, ids: Tensor, gating: Gating) -> Tensor:
    weights = scores.gather(-1, ids)
    if gating.renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * gating.scaling


def _keep_best_groups(choice: Tensor, gating: Gating) -> Tensor:
    grouped: Tensor = choice.unflatten(-1, (gating.group_count, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1) if gating.group_select_mode == 1 else grouped.amax(-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : gating.k_group]
    dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
    return grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)


def swiglu_quant_twice(product: Tensor) -> Quantized:
    """SwiGLU and quantization of products `[R, 2·I]`, float32, as `npu_grouped_matmul_swiglu_quant_v2` rounds.

    scale = max|y| / 127; codes = round-half-even(float16(y · (1 / scale))). Of codes from 64 on, one in 32 differs from
    that of one rounding by one, since float16 steps by 1/16 there. Source: its kernel in CANN's ops-transformer.
    """
    gate, up = product.chunk(2, dim=-1)
    values = F.silu(gate) * up
    scale = row_maximum(values) / 127.0
    quotient = values * nonzero(scale).reciprocal()
    return Quantized(quotient.half().float().round().nan_to_num(0.0).to(torch.int8), scale)
