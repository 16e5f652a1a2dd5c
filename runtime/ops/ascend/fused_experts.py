"""Gate and up of the routed experts with their activation, in one operator: `npu_grouped_matmul_swiglu_quant_v2`.

CANN documents it for int8 rows and int4 weights, with the scale words and the bias of the plain grouped matmul.
torch_npu's page lists other dtypes of the scale, and vLLM-Ascend calls a build of its own. So it is tried on the first
layer's own weights when they are loaded, against the two operators that it stands for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...ranks.group import Group
from ..handles import Experts, Quantized
from ..norms import Norms
from ..products import Products
from .device import ROWS_OF_EACH, Npu
from .weights import QuantizedExperts, W4A8Experts, fits_nz

PER_CHANNEL = 0  # dequant_mode
MOST_INPUTS, MOST_OUTPUTS = 20000, 10240
_TRIAL_ROWS = 3  # for each of the first experts


class FusedExperts:
    """The operator, and whether it can be used. works: None before the trial.

    group: of the ranks, which all use it or none: its codes are not those of the two operators. Each tries it on its
    own experts.
    """

    def __init__(self, npu: Npu, norms: Norms, products: Products, group: Group, wanted: bool):
        self.npu, self.norms, self.products, self.group = npu, norms, products, group
        self.works: bool | None = None if wanted else False

    def takes(self, experts: Experts) -> bool:
        """True for experts of documented sizes, after a trial on the first of them. It waits for the device once."""
        if self.works is False or not isinstance(experts, QuantizedExperts):
            return False
        inputs, outputs = experts.weight.shape[1], experts.scale.shape[-1]
        if inputs >= MOST_INPUTS or outputs > MOST_OUTPUTS or outputs % 2:
            return False
        if not isinstance(experts, W4A8Experts) and not fits_nz(experts.weight):
            return False
        if self.works is None:
            fails = torch.tensor([int(not self._agrees(experts))])
            self.works = not int(self.group.all_reduce_max(fails))
        return self.works

    def run(self, rows: Quantized, experts: Experts, group_list: Tensor) -> Quantized:
        """Multiply rows `[R, H]` by their experts, activate and quantize: as `Routing.experts_inner`.

        float32 from the product to the codes, which are rounded twice, to float16 and to int8.
        """
        assert isinstance(experts, QuantizedExperts)
        scale = experts.scale.flatten(1)  # [E, N]
        bias = {"weight_assist_matrix": [experts.scale_bias]} if isinstance(experts, W4A8Experts) else {}
        codes, row_scale = self.npu.operators.npu_grouped_matmul_swiglu_quant_v2(
            rows.codes,
            [experts.weight],
            [scale],
            rows.scale,
            group_list,
            dequant_mode=PER_CHANNEL,
            group_list_type=ROWS_OF_EACH,
            **bias,
        )
        return Quantized(codes, row_scale)

    def _agrees(self, experts: QuantizedExperts) -> bool:
        count = experts.weight.shape[0]
        groups = torch.zeros(count, dtype=torch.int64)
        groups[:4] = _TRIAL_ROWS
        total, inputs = int(groups.sum()), experts.weight.shape[1]
        codes = torch.arange(total * inputs).mul(97).remainder(251).sub(125).to(torch.int8).view(total, inputs)
        scale = torch.linspace(0.01, 0.02, total)
        device = self.npu.device

        def rows() -> Quantized:  # the matmul overwrites them
            return Quantized(codes.to(device, copy=True), scale.to(device, copy=True))

        product = self.products.grouped_matmul(rows(), experts, groups.to(device))
        wanted = self.norms.dequant_swiglu_quant(product)
        try:
            found = self.run(rows(), experts, groups.to(device))
            off = (found.codes.cpu().int() - wanted.codes.cpu().int()).abs()
            apart = (found.scale.cpu() / wanted.scale.cpu() - 1).abs()
        except RuntimeError:  # CANN's refusal
            return False
        # bfloat16 between the two operators moves large codes by one.
        return bool(off.max() <= 2) and bool(apart.max() < 0.02)
