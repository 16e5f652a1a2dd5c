"""The operator set on torch_npu: weights in FRACTAL_NZ, the latent cache in NZ pages, one device call an operator.

A decode step of a MoE layer is 27 launches, or 20 where `npu_mla_prolog_v3` takes the layer (docs/ascend.md has the
table). No call here waits for the device: lengths come from the step as host integers, everything else stays a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import BackendError
from ..layout import CHANNELS
from . import Activation, Experts, Gating, LayerCache, Linear, LinearPart, Mla, MlaConfig, MlaParts, Quantized, Router
from .ascend_attention import causal_mask
from .ascend_int8_cache import AscendInt8Cache
from .ascend_mla import lay_out_mla
from .ascend_support import import_torch_npu, require_soc
from .ascend_weights import FloatExperts, FloatLinear, Layout, StaticLinear, W4A8Experts, W8A8Experts, W8A8Linear

COUNTS = 1  # group_list_type and expert_tokens_num_type: rows of each expert, not running sums
ROW_ORDER = 2  # drop_pad_mode of finalize: row_index[t · k + j], as init_routing_v2 gives it (the default is columns)
DYNAMIC_INT8, NOT_QUANTIZED = 1, -1  # quant_mode of init_routing_v2


class AscendOps(AscendInt8Cache):
    """Operators on one NPU.

    kv_layout: "nz" (pages in FRACTAL_NZ, what decode attention reads fastest) or "nd". fused_prolog: use
    `npu_mla_prolog_v3` for layers whose shapes it documents. soc: the chip's name; None asks the driver.
    Raises BackendError without torch_npu or CANN, on a chip that lacks the operators, and for unknown settings.
    """

    name = "ascend"
    COMPUTE_DTYPES: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)

    def __init__(
        self,
        device: str | torch.device = "npu:0",
        dtype: torch.dtype = torch.bfloat16,
        kv_layout: str = "nz",
        fused_prolog: bool = True,
        soc: str | None = None,
    ):
        if kv_layout not in ("nz", "nd"):
            raise BackendError(f"kv_layout {kv_layout!r} is neither 'nz' nor 'nd'")
        if dtype not in self.COMPUTE_DTYPES:
            known = " or ".join(str(known).removeprefix("torch.") for known in self.COMPUTE_DTYPES)
            raise BackendError(f"the ascend backend computes in {known}, not {str(dtype).removeprefix('torch.')}")
        torch_npu = import_torch_npu()
        self.device = torch.device(device)
        if self.device.type == "npu":
            if not torch_npu.npu.is_available():
                raise BackendError("torch_npu finds no NPU: check `npu-smi info` and the driver, or run `npuq doctor`")
            torch_npu.npu.config.allow_internal_format = True  # else npu_format_cast keeps ND
            torch_npu.npu.set_device(self.device)
            soc = soc or torch_npu.npu.get_device_name(self.device)
        if soc is None:
            raise BackendError(f"{self.device} is not an NPU")
        self.soc = require_soc(soc)
        self.dtype = dtype
        self.kv_layout = "nz" if kv_layout == "nz" else "nd"
        self.fused_prolog = fused_prolog
        self._npu: Any = torch.ops.npu
        self._layout = Layout(self.device, dtype)
        self._causal_mask = causal_mask(self.device)
        self._one = torch.ones(1, dtype=torch.float32, device=self.device)

    # ---- at load ---------------------------------------------------------------------------------------------------

    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        return self._layout.float_linear(weights)

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return self._layout.w8a8_linear(parts)

    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return self._layout.static_linear(parts)

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return self._layout.float_experts(experts)

    def w8a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return self._layout.w8a8_experts(experts)

    def w4a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return self._layout.w4a8_experts(experts)

    def router(self, weight: Tensor) -> Router:
        return weight.float().to(self.device)

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor.to(self.device, dtype or tensor.dtype).contiguous()

    def new_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_lora_rank: int,
        rope_dim: int,
        latent_scales: Sequence[Tensor] | None = None,
    ) -> tuple[LayerCache, ...]:
        if block_size % 16 or not 0 < block_size <= 1024:
            raise BackendError(f"block_size {block_size}: the NPU's paged attention takes multiples of 16 up to 1024")

        if latent_scales is not None:
            return self._int8_cache(latent_scales, num_blocks, block_size, rope_dim)

        def pool(channels: int) -> Tensor:
            pages = (
                (channels // CHANNELS, block_size, CHANNELS) if self.kv_layout == "nz" else (block_size, 1, channels)
            )
            return torch.zeros(num_blocks, *pages, dtype=self.dtype, device=self.device)

        return tuple(LayerCache(pool(kv_lora_rank), pool(rope_dim), block_size) for _ in range(num_layers))

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        return lay_out_mla(parts, config, self, self._layout, self.fused_prolog)

    # ---- norms and activations -------------------------------------------------------------------------------------

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(token_ids, table).to(self.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        normed: Tensor = self._npu.npu_rms_norm(x, gamma, epsilon=eps)[0]
        return normed

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, _, total = self._npu.npu_add_rms_norm(x, residual, gamma, epsilon=eps)
        return normed, total

    def swiglu(self, x: Tensor) -> Tensor:
        activated: Tensor = self._npu.npu_swiglu(x, dim=-1)
        return activated

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        if smooth is None:
            return Quantized(*self._npu.npu_dynamic_quant(x))
        return Quantized(*self._npu.npu_dynamic_quant(x, smooth_scales=smooth))

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        # Both defaults are wrong here: they activate the right half and quantize statically.
        return Quantized(*self._npu.npu_dequant_swiglu_quant(x, activate_left=True, quant_mode=1))

    # ---- matmuls ---------------------------------------------------------------------------------------------------

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        handle: FloatLinear | W8A8Linear | StaticLinear = linear
        if isinstance(handle, FloatLinear):
            if isinstance(x, Quantized):
                raise BackendError("a float linear was given quantized rows")
            return F.linear(x, handle.weight)
        if isinstance(handle, StaticLinear):
            return self._static_matmul(x, handle)
        rows = x if isinstance(x, Quantized) else self.dynamic_quant(x)
        product: Tensor = self._npu.npu_quant_matmul(
            rows.codes, handle.weight, handle.scale, pertoken_scale=rows.scale, output_dtype=self.dtype
        )
        return product

    def _static_matmul(self, x: Activation, handle: StaticLinear) -> Tensor:
        if isinstance(x, Quantized):
            raise BackendError("a static W8A8 linear was given quantized rows")
        # div_mode False multiplies: the engines' choice, and the one that takes float16 too.
        codes = self._npu.npu_quantize(x, handle.factor, handle.offset, torch.qint8, -1, False)
        product: Tensor = self._npu.npu_quant_matmul(
            codes, handle.weight, handle.deq_scale, bias=handle.quant_bias, output_dtype=self.dtype
        )
        return product

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return F.linear(x.float(), router)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        handle: FloatExperts | W8A8Experts | W4A8Experts = experts
        if isinstance(handle, FloatExperts):
            if isinstance(x, Quantized):
                raise BackendError("float experts were given quantized rows")
            return self._grouped_matmul(x, handle.weight, group_list)
        rows = x if isinstance(x, Quantized) else self.dynamic_quant(x)
        scales = {"scale": [handle.scale], "per_token_scale": [rows.scale]}
        if isinstance(handle, W4A8Experts):
            return self._grouped_matmul(rows.codes, handle.weight, group_list, bias=[handle.scale_bias], **scales)
        return self._grouped_matmul(rows.codes, handle.weight, group_list, **scales)

    def _grouped_matmul(self, rows: Tensor, weight: Tensor, group_list: Tensor, **scales: list[Tensor]) -> Tensor:
        product: Tensor = self._npu.npu_grouped_matmul(
            [rows],
            [weight],
            group_list=group_list,
            group_list_type=COUNTS,
            group_type=0,
            split_item=2,
            output_dtype=self.dtype,
            **scales,
        )[0]
        return product

    # ---- routing ---------------------------------------------------------------------------------------------------

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        check_gating(gating, bias is not None)
        sigmoid = gating.scoring == "sigmoid"
        if sigmoid == gating.renormalize:
            weights, ids, _ = self._npu.npu_moe_gating_top_k(
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
        weights, ids, _ = self._npu.npu_moe_gating_top_k_softmax_v2(logits, k=gating.k, renorm=1)
        return (weights if gating.scaling == 1.0 else weights * gating.scaling), ids

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        rows, row_index, group_list, scale = self._npu.npu_moe_init_routing_v2(
            x,
            expert_ids,
            active_num=expert_ids.numel(),
            expert_num=num_experts,
            expert_tokens_num_type=COUNTS,
            expert_tokens_num_flag=True,
            active_expert_range=[0, num_experts],
            quant_mode=DYNAMIC_INT8 if quantize else NOT_QUANTIZED,
        )
        return (Quantized(rows, scale) if quantize else rows), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        out: Tensor = self._npu.npu_moe_finalize_routing(
            rows, skip, None, None, weights.to(self.dtype), row_index, expert_ids, drop_pad_mode=ROW_ORDER
        )
        return out


def check_gating(gating: Gating, biased: bool) -> None:
    """Raises BackendError for a router that the NPU has no operator for.

    Its sigmoid router always normalises the weights; its softmax router does only without groups and correction bias.
    """
    sigmoid = gating.scoring == "sigmoid"
    if sigmoid != gating.renormalize and (sigmoid or biased or gating.group_count > 1):
        groups = f" in {gating.group_count} groups" if gating.group_count > 1 else ""
        raise BackendError(
            f"the NPU has no router that scores by {gating.scoring}{groups} with norm_topk_prob "
            f"{str(gating.renormalize).lower()}"
        )
