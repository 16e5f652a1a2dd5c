"""The operators on torch_npu: weights in FRACTAL_NZ, the latent cache in NZ pages, one device call an operator.

A MoE layer is 27 launches in a decode step, or 19 where `npu_mla_prolog_v3` takes the layer; a lightning indexer adds
15 (table in docs/ascend.md). No call waits for the device: a step's lengths are integers on the host, all
else stays in tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....errors import BackendError
from ....inputs.printable import error_line, shown
from ...ranks.group import ALONE, Group
from ...sampling.rows import LogitRow
from .. import Ops
from .attention.cache import AscendCaches
from .attention.grouped import AscendGroupedAttention
from .attention.latent import AscendLatentAttention
from .attention.rotary import AscendRotary
from .attention.sparse import AscendSparseAttention
from .device import Npu
from .graph.capture import NpuGraphs
from .logits import device_rows
from .norms import AscendNorms
from .products import AscendProducts
from .ranks.communicator import communicator_of
from .routing import AscendRouting
from .side_stream import SideStream
from .support import import_torch_npu, require_soc
from .tuning.file import read_tuning, tuned_device, tuning_path
from .tuning.grouped_matmul import Tuning
from .weights import AscendWeights


class AscendOps(Ops):
    """Operators on one NPU.

    kv_layout: "nz" (pages in FRACTAL_NZ, fastest for decode attention) or "nd"; caches of sparse and of grouped-query
    attention are "nd" in any case. fused_prolog: use `npu_mla_prolog_v3` for layers whose shapes it documents.
    fused_experts: use `npu_grouped_matmul_swiglu_quant_v2`, if a trial shows that it can be. soc: the chip's name; None
    asks the driver. Raises BackendError without torch_npu or CANN, on a chip that lacks the operators, and for unknown
    settings.
    """

    name = "ascend"
    mla: AscendLatentAttention
    routing: AscendRouting
    COMPUTE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __init__(
        self,
        device: str | torch.device = "npu:0",
        dtype: torch.dtype = torch.bfloat16,
        kv_layout: str = "nz",
        fused_prolog: bool = True,
        fused_experts: bool = True,
        soc: str | None = None,
        group: Group = ALONE,
        tuning: Tuning | None = None,
    ):
        if kv_layout not in ("nz", "nd"):
            raise BackendError(f"kv_layout {kv_layout!r} is neither 'nz' nor 'nd'")
        if dtype not in self.COMPUTE_DTYPES:
            known = " or ".join(str(known).removeprefix("torch.") for known in self.COMPUTE_DTYPES)
            raise BackendError(f"the ascend backend computes in {known}, not {str(dtype).removeprefix('torch.')}")
        torch_npu = import_torch_npu()
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise BackendError(f"device {shown(device)} is none; NPUs are npu:0, npu:1 …") from error
        self.pinned = self.device.type == "npu"
        if self.device.type == "npu":
            if not torch_npu.npu.is_available():
                raise BackendError("torch_npu finds no NPU: check `npu-smi info` and the driver, or run `npuq doctor`")
            torch_npu.npu.config.allow_internal_format = True  # else npu_format_cast keeps ND
            try:
                torch_npu.npu.set_device(self.device)
                soc = soc or torch_npu.npu.get_device_name(self.device)
            except RuntimeError as error:  # there is no such device, another process holds it, or it is faulty
                reason = error_line(error)
                raise BackendError(f"{self.device} cannot be used: {reason}; `npuq doctor` lists the NPUs") from error
        if soc is None:
            raise BackendError(f"{self.device} is not an NPU")
        self.soc = require_soc(soc)
        self.dtype, self.group = dtype, group
        if self.device.type == "npu":
            self.graphs = NpuGraphs(torch_npu.npu, self.device)
            if tuning is None:
                tuning = read_tuning(tuning_path(), tuned_device(torch_npu, self.device))
        side = SideStream(torch_npu.npu) if self.device.type == "npu" else None
        self.npu = Npu(self.device, dtype, "nz" if kv_layout == "nz" else "nd", torch.ops.npu, side)
        self.weights = weights = AscendWeights(self.device, dtype)
        self.norms = AscendNorms(self.npu)
        self.products = AscendProducts(self.npu, self.norms, tuning or Tuning())
        communicator = communicator_of(self.soc.family, group)
        self.routing = AscendRouting(self.npu, self.norms, self.products, group, communicator, fused_experts)
        self.caches = AscendCaches(self.npu)
        self.rotary = AscendRotary(self.npu)
        self.mla = AscendLatentAttention(self.npu, weights, self.norms, self.products, self.rotary, fused_prolog)
        self.sparse = AscendSparseAttention(self.npu, weights, self.norms, self.products, self.rotary)
        self.gqa = AscendGroupedAttention(self.npu, weights, self.norms, self.products, self.rotary)

    def logit_rows(self, logits: Tensor) -> Sequence[LogitRow]:
        return device_rows(logits)

    def findings(self) -> list[str]:
        return [*self.mla.findings(), *self.routing.findings()]

    @property
    def arithmetic(self) -> str:
        return self.soc.family
